"""Starting a broker: mosquitto where it is installed, else an embedded one for development; and configuring one."""

from aggregator.broker.launcher import (
    KINDS,
    BrokerStartError,
    RunningBroker,
    die_with_parent,
    find_mosquitto,
    run_broker_in_foreground,
    start_broker,
)
from aggregator.broker.mosquitto import BrokerConfigError, write_config

__all__ = [
    "KINDS",
    "BrokerConfigError",
    "BrokerStartError",
    "RunningBroker",
    "die_with_parent",
    "find_mosquitto",
    "run_broker_in_foreground",
    "start_broker",
    "write_config",
]
