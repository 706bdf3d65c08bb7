"""Starting a broker: mosquitto where it is installed, else an embedded one for development."""

from aggregator.broker.launcher import (
    KINDS,
    BrokerStartError,
    RunningBroker,
    die_with_parent,
    find_mosquitto,
    run_broker_in_foreground,
    start_broker,
)

__all__ = [
    "KINDS",
    "BrokerStartError",
    "RunningBroker",
    "die_with_parent",
    "find_mosquitto",
    "run_broker_in_foreground",
    "start_broker",
]
