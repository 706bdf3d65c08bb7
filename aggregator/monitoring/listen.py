"""The address of the monitoring endpoint, as settings spell it."""

from __future__ import annotations


def parse_listen(text: str) -> tuple[str, int]:
    """``host:port`` or ``[IPv6]:port``; port 0: a free one. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("an IPv6 address stands in brackets")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
        raise ValueError("host:port is expected")
    return host, int(port)


def spelt(host: str, port: int) -> str:
    """What ``parse_listen`` reads."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
