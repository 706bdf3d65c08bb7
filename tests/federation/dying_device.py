"""``edge-runtime run`` in a process that kills itself between the first and the second piece of an update.

python dying_device.py run --config ...     The broker has acknowledged the first piece by then.
"""

from __future__ import annotations

import os
import signal
import time

from edge_runtime import cli
from edge_runtime.protocol.envelope import unpack
from edge_runtime.protocol.errors import RemoteProtocolError
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.topics import sender_of
from edge_runtime.transport.mqtt import MqttTransport


def is_update(topic: str, payload: bytes) -> bool:
    """A piece of an update, whoever sends it."""
    try:
        federation, _ = sender_of(topic)
        unpack(payload, federation, Kind.UPDATE)
    except RemoteProtocolError:
        return False
    return True


def die_after_the_first_piece() -> None:
    """Wrap ``publish``: it never returns from the first piece of an update."""
    publish = MqttTransport.publish

    def publish_and_die(self: MqttTransport, topic: str, payload: bytes, *, retain: bool = False) -> None:
        publish(self, topic, payload, retain=retain)
        if is_update(topic, payload):
            while self._connection is not None and self._connection.inflight:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)

    MqttTransport.publish = publish_and_die  # type: ignore[method-assign]


if __name__ == "__main__":
    die_after_the_first_piece()
    cli.main()
