"""amqtt as a development broker, run as a child process. The only module that imports amqtt.

    python -m aggregator.broker_amqtt PORT      on 127.0.0.1, until standard input ends

Standard input is a pipe held by the parent: when the parent dies, however it dies, the pipe closes and so do we.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

from amqtt.broker import Broker
from amqtt.errors import AMQTTError
from amqtt.plugins.base import BaseAuthPlugin
from amqtt.session import Session


class LoopbackAuth(BaseAuthPlugin):  # type: ignore[misc]  # amqtt is untyped
    """Lets everyone in, as its own anonymous plugin does, but by name: sessions of clients it knows as anonymous
    are dropped when they disconnect, and with them every message that waits for a device."""

    async def authenticate(self, *, session: Session) -> bool:
        session.is_anonymous = False
        return True


class DevelopmentBroker(Broker):  # type: ignore[misc]
    """amqtt takes the properties of an MQTT 5 CONNECT for garbage and leaves the connection open, silent. Closed, it
    tells the client at once to try MQTT 3.1.1. With a release that lacks this method, connecting is merely slower."""

    async def _initialize_client_session(self, reader: Any, writer: Any, *peer: Any) -> Any:
        try:
            return await super()._initialize_client_session(reader, writer, *peer)
        except AMQTTError:
            await writer.close()
            raise


async def _serve(port: int) -> None:
    broker = DevelopmentBroker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
            "plugins": {"aggregator.broker_amqtt.LoopbackAuth": {}},
        }
    )
    await broker.start()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)
    await broker.shutdown()


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    asyncio.run(_serve(int(sys.argv[1])))
