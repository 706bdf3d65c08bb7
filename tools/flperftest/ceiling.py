"""What the machine itself can do, measured beside a run, so that figures of a busy machine can be told apart."""

from __future__ import annotations

import socket
import threading
import time

_BLOCK_BYTES = 256 * 1024


def loopback_bytes_per_s(seconds: float = 0.5) -> float:
    """One TCP connection over 127.0.0.1, blocks of 256 KiB, no protocol: bytes a second."""
    block = bytes(_BLOCK_BYTES)
    received = 0

    def read(connection: socket.socket) -> None:
        nonlocal received
        buffer = bytearray(_BLOCK_BYTES)
        while count := connection.recv_into(buffer):
            received += count

    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    thread = threading.Thread(target=read, args=(receiver,), daemon=True)
    started = time.perf_counter()
    thread.start()
    with sender:
        while time.perf_counter() - started < seconds:
            sender.sendall(block)
    thread.join()
    receiver.close()
    return received / (time.perf_counter() - started)
