"""The ``[broker]`` section that the device's and the aggregator's settings share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from edge_runtime.settings import require
from edge_runtime.transport.address import BrokerAddress, parse_broker_url, read_password
from edge_runtime.transport.base import TransportError


@dataclass(frozen=True, kw_only=True)
class BrokerConfig:
    """Files are PEM; ``password_file`` holds the password alone. ``url`` None: the enrolment token brings it."""

    url: str | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    username: str | None = None
    password_file: Path | None = None

    def __post_init__(self) -> None:
        if self.url is not None:
            require("@" not in self.url, "url", "a URL with a user in it", "use username and password_file")
            try:
                parse_broker_url(self.url)
            except TransportError as error:
                require(False, "url", self.url, str(error))
            tls = self.ca_file or self.cert_file or self.key_file
            require(
                tls is None or self.url.startswith("mqtts:"),
                "url",
                self.url,
                "ca_file, cert_file and key_file need mqtts://",
            )
        require(
            (self.cert_file is None) == (self.key_file is None),
            "cert_file",
            self.cert_file or self.key_file,
            "cert_file and key_file come together",
        )
        require(
            self.password_file is None or self.username is not None,
            "username",
            None,
            "a password needs a username (MQTT 3.1.1)",
        )

    def address(self, default_url: str | None = None) -> BrokerAddress:
        """Where to connect; ``default_url``, which may bring credentials, where the section names none.

        The section's username goes before the URL's, and no password but its own goes with it.
        Raises TransportError.
        """
        url = self.url or default_url
        if url is None:
            raise TransportError("no broker is configured: set [broker] url, or enrol with a token")
        if self.username is not None:
            scheme, _, rest = url.partition("://")
            url = f"{scheme}://{quote(self.username, safe='')}@{rest.rpartition('@')[2]}"
        return parse_broker_url(
            url,
            password=read_password(self.password_file, os.environ) if self.username else None,
            ca_file=self.ca_file,
            cert_file=self.cert_file,
            key_file=self.key_file,
        )
