"""Start a broker for one site: mosquitto if it is installed, else amqtt for development. Never used by ``serve``.

Both end with the process that started them: amqtt reads a pipe that closes with its parent; mosquitto gets SIGTERM
from the Linux kernel (PR_SET_PDEATHSIG), upon which it writes its state. Elsewhere an orphaned mosquitto stays.
That signal follows the *thread* that called ``start_broker``: call it from one that lives as long as the broker.
"""

from __future__ import annotations

import ctypes
import importlib.util
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from aggregator.files import write_atomic
from edge_runtime.protocol.errors import Fault, FleetgradError

MAX_PACKET_BYTES = 1_048_576
KINDS = ("mosquitto", "amqtt")
_SBIN = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")  # Debian's is not on a user's PATH
_LOG_NAME = "broker.log"
_PR_SET_PDEATHSIG = 1
_CONNECT = b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x0a\x00\x01p"  # MQTT 3.1.1, clean session, client id "p"
_ACCEPTED = b"\x20\x02\x00\x00"
_AMQTT_WARNING = (
    "WARNING: the broker is amqtt, for development only, since mosquitto is not installed or not wanted: it keeps "
    "all in memory, speaks MQTT 3.1.1, is many times slower and forgets what is not acknowledged within 5 s. "
    "Install mosquitto (`apt install mosquitto`) for anything else."
)


class BrokerStartError(
    FleetgradError, fault=Fault.SURROUNDINGS, remedy="install mosquitto, or free the port that is named"
):
    """The broker did not come up; the text says why and what to do."""


class RunningBroker:
    """A broker of ours. As a context manager it stops at the end of the block."""

    def __init__(
        self, kind: str, host: str, port: int, folder: Path, process: subprocess.Popen[bytes]
    ) -> None:
        self.kind = kind
        self.host = host
        self.port = port
        self.folder = folder
        self._process = process

    @property
    def url(self) -> str:
        """What clients connect to: ``mqtt://host:port``."""
        return f"mqtt://{_bracketed(self.host)}:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log_file(self) -> Path:
        return self.folder / _LOG_NAME

    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self, timeout_s: float = 10.0) -> None:
        """SIGTERM: mosquitto writes its sessions and retained messages to disk, then ends. Kills after a while."""
        self._close_pipe()
        if self.running():
            self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL: mosquitto loses what came after its last autosave."""
        if self.running():
            self._process.kill()
        self._process.wait()
        self._close_pipe()

    def __enter__(self) -> RunningBroker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _close_pipe(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()


def start_broker(
    folder: Path,
    *,
    port: int = 0,
    bind: str = "127.0.0.1",
    password_file: Path | None = None,
    kind: str | None = None,
    timeout_s: float = 10.0,
    warn: Callable[[str], None] | None = None,
) -> RunningBroker:
    """Start a broker with its configuration, log and state in ``folder``; wait until it takes connections.

    ``port`` 0 takes a free one. ``bind``: an IP address; one that is not loopback needs ``password_file`` (made
    with ``mosquitto_passwd``), since an open broker on a network lets anyone publish. ``kind``: one of KINDS, None
    for the first that is installed. ``warn`` gets one text when amqtt is used (default: standard error).
    Raises BrokerStartError.
    """
    address = _address(bind)
    if kind is not None and kind not in KINDS:
        raise BrokerStartError(f"no broker kind {kind!r}: choose one of {', '.join(KINDS)}")
    if not address.is_loopback and password_file is None:
        raise BrokerStartError(
            f"refusing an open broker on {bind}: anyone who reaches it could publish. Give a password file "
            "(`mosquitto_passwd -c FILE USER`), or run mosquitto yourself with TLS and ACLs "
            "(`aggregator broker-config mosquitto`)"
        )
    if password_file is not None and not password_file.is_file():
        raise BrokerStartError(
            f"the password file {password_file} does not exist (`mosquitto_passwd -c FILE USER`)"
        )
    mosquitto = find_mosquitto() if kind in (None, "mosquitto") else None
    use_amqtt = mosquitto is None and kind != "mosquitto" and importlib.util.find_spec("amqtt") is not None
    if mosquitto is None and not use_amqtt:
        wanted = kind or "broker"
        raise BrokerStartError(
            f"no {wanted} found: install mosquitto (`apt install mosquitto` or `brew install mosquitto`; "
            f"looked on PATH and in {', '.join(_SBIN)}), or for development `pip install amqtt`; or configure the "
            "URL of a broker"
        )
    if use_amqtt and (bind != "127.0.0.1" or password_file is not None):
        raise BrokerStartError("amqtt is for development on 127.0.0.1 without passwords: install mosquitto")
    folder = folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BrokerStartError(f"cannot make the broker's folder {folder}: {error.strerror}") from error
    port = _free_port(bind, port)
    if mosquitto is not None:
        command = _mosquitto_command(mosquitto, folder, bind, port, password_file)
        process = _spawn(command, folder, pipe=False)
        broker = RunningBroker("mosquitto", bind, port, folder, process)
    else:
        (warn or _warn_on_stderr)(_AMQTT_WARNING)
        command = [sys.executable, "-m", "aggregator.broker.embedded", str(port)]
        broker = RunningBroker("amqtt", bind, port, folder, _spawn(command, folder, pipe=True))
    _wait_until_accepting(broker, timeout_s)
    return broker


def run_broker_in_foreground(
    folder: Path,
    *,
    port: int = 1883,
    bind: str = "127.0.0.1",
    password_file: Path | None = None,
    url_file: Path | None = None,
    echo: Callable[[str], None] = print,
) -> int:
    """Run a broker until SIGINT or SIGTERM; returns the exit code: 0, or 1 if the broker ended by itself.

    ``url_file``: written once the broker listens, for whoever waits for it.

    Call it from the main thread (signals). Raises BrokerStartError.
    """
    wanted = threading.Event()
    previous = {
        number: signal.signal(number, lambda *_: wanted.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with start_broker(folder, port=port, bind=bind, password_file=password_file, warn=echo) as broker:
            echo(
                f"{broker.kind} listens at {broker.url}; its state and log are in {broker.folder}; Ctrl-C ends it"
            )
            if url_file is not None:
                write_atomic(url_file, broker.url.encode() + b"\n", mode=0o644)
            while not wanted.wait(0.5):
                if not broker.running():
                    echo(f"the broker ended by itself: {_log_tail(broker)}")
                    return 1
        return 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def find_mosquitto() -> str | None:
    """The path of mosquitto: on PATH, else in the system folders that a user's PATH may lack."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path=os.pathsep.join(_SBIN))


def mosquitto_config(folder: Path, bind: str, port: int, password_file: Path | None) -> str:
    """The generated configuration; ``aggregator broker-config mosquitto`` writes the one for a network."""
    access = (
        ["allow_anonymous true"]
        if password_file is None
        else ["allow_anonymous false", f"password_file {password_file}"]
    )
    # Started by root, mosquitto becomes the user `mosquitto`, who may not enter a folder of root's (containers,
    # CI). Whoever wants it unprivileged starts it unprivileged. A change of user would also clear the death signal.
    user = ["user root"] if os.geteuid() == 0 else []
    lines = [
        "# Written by `aggregator broker` at every start: changes are lost.",
        f"listener {port} {bind}",
        *access,
        *user,
        f"max_packet_size {MAX_PACKET_BYTES}",
        "# 0: no limit. At a limit mosquitto drops messages and tells nobody.",
        "max_queued_messages 0",
        "set_tcp_nodelay true",
        "persistence true",
        f"persistence_location {folder}/",
        "autosave_interval 60",
        "persistent_client_expiration 14d",
        f"log_dest file {folder / _LOG_NAME}",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "log_timestamp_format %Y-%m-%dT%H:%M:%S",
    ]
    return "\n".join(lines) + "\n"


def _mosquitto_command(
    mosquitto: str, folder: Path, bind: str, port: int, password_file: Path | None
) -> list[str]:
    if any(character in str(folder) for character in "\n\r"):
        raise BrokerStartError(f"the broker's folder has a line break in its name: {str(folder)!r}")
    config = folder / "mosquitto.conf"
    resolved = None if password_file is None else password_file.resolve()
    config.write_text(mosquitto_config(folder, bind, port, resolved), "utf-8")
    return [mosquitto, "-c", str(config)]


def _spawn(command: Sequence[str], folder: Path, *, pipe: bool) -> subprocess.Popen[bytes]:
    with (folder / _LOG_NAME).open("ab") as output:
        # Own session: Ctrl-C reaches the parent only, which then stops the broker in its own order.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE if pipe else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=None if pipe else die_with_parent(signal.SIGTERM),
        )


def die_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    """For ``preexec_fn``: the child gets this signal when its parent dies. None where there is no such thing."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # loaded before the fork: the child only makes the call
    parent = os.getpid()

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return in_child


def _address(bind: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(bind)
    except ValueError as error:
        raise BrokerStartError(f"{bind!r} is no IP address to listen on (127.0.0.1, 0.0.0.0, ...)") from error


def _free_port(bind: str, port: int) -> int:
    """The port itself if nobody listens there, or a free one for 0."""
    with socket.socket(socket.AF_INET6 if ":" in bind else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind, port))
        except OSError as error:
            raise BrokerStartError(
                f"cannot listen on {_bracketed(bind)}:{port}: {error.strerror}; another broker may run there: "
                "use its URL, or choose another port (0 takes a free one)"
            ) from error
        except OverflowError as error:
            raise BrokerStartError(f"port {port} is not between 0 and 65535") from error
        return int(probe.getsockname()[1])


def _wait_until_accepting(broker: RunningBroker, timeout_s: float) -> None:
    """Until it answers CONNECT (or refuses it for want of a password), not just until the port is open."""
    deadline = time.monotonic() + timeout_s
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(broker.host, broker.host)  # noqa: S104 - a comparison
    while time.monotonic() < deadline:
        if not broker.running():
            raise BrokerStartError(f"{broker.kind} ended at once: {_log_tail(broker)}")
        try:
            with socket.create_connection((host, broker.port), timeout=1.0) as connection:
                connection.sendall(_CONNECT)
                if connection.recv(4)[:2] == _ACCEPTED[:2]:
                    connection.sendall(b"\xe0\x00")  # DISCONNECT
                    return
        except OSError:
            pass
        time.sleep(0.02)
    broker.kill()
    raise BrokerStartError(f"{broker.kind} did not answer within {timeout_s:g} s: {_log_tail(broker)}")


def _log_tail(broker: RunningBroker) -> str:
    try:
        lines = broker.log_file.read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    return f"{' | '.join(lines[-3:]) or 'it wrote nothing'} (log: {broker.log_file})"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _warn_on_stderr(text: str) -> None:
    print(text, file=sys.stderr)
