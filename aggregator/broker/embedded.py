"""amqtt as a development broker, run as a child process. The only module that imports amqtt.

    python -m aggregator.broker.embedded PORT      on 127.0.0.1, until standard input ends

Standard input is a pipe held by the parent: when the parent dies, however it dies, the pipe closes and so do we.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

from amqtt.adapters import BufferReader
from amqtt.broker import Broker
from amqtt.errors import MQTTError
from amqtt.plugins.base import BaseAuthPlugin
from amqtt.session import Session

_LEVEL_AT = 6  # of a CONNECT's body: two bytes of length, "MQTT", then the protocol level
_WRONG_VERSION = b"\x20\x02\x00\x01"  # CONNACK: unacceptable protocol version (MQTT 3.1.1, 3.2.2.3)


class LoopbackAuth(BaseAuthPlugin):  # type: ignore[misc]  # amqtt is untyped
    """Lets everyone in, as its own anonymous plugin does, but by name: sessions of clients it knows as anonymous
    are dropped when they disconnect, and with them every message that waits for a device."""

    async def authenticate(self, *, session: Session) -> bool:
        session.is_anonymous = False
        return True


class DevelopmentBroker(Broker):  # type: ignore[misc]
    """Refuses MQTT 5 at once, so that clients try 3.1.1. amqtt itself takes the properties of an MQTT 5 CONNECT
    for a length and waits for bytes that never come. On a release without this method, connecting is slower."""

    async def _initialize_client_session(self, reader: Any, writer: Any, *peer: Any) -> Any:
        try:
            head, body = await _first_packet(reader)
        except (EOFError, OSError) as error:
            raise MQTTError("the client left before CONNECT") from error
        if body[_LEVEL_AT : _LEVEL_AT + 1] == b"\x05":
            writer.write(_WRONG_VERSION)
            await writer.drain()
            await writer.close()
            raise MQTTError("MQTT 5 is not spoken here")
        return await super()._initialize_client_session(BufferReader(head + body), writer, *peer)


async def _first_packet(reader: Any) -> tuple[bytes, bytes]:
    """Fixed header and body; a length is one to four bytes of seven bits (MQTT 3.1.1, 2.2.3)."""
    head = await reader.read(1)
    length = 0
    for shift in (0, 7, 14, 21):
        byte = await reader.read(1)
        head += byte
        length |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            break
    return head, await reader.read(length)


async def _serve(port: int) -> None:
    broker = DevelopmentBroker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
            "plugins": {"aggregator.broker.embedded.LoopbackAuth": {}},
        }
    )
    await broker.start()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)
    await broker.shutdown()


if __name__ == "__main__":
    logging.basicConfig(level=logging.CRITICAL, stream=sys.stderr)
    asyncio.run(_serve(int(sys.argv[1])))
