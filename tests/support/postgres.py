"""A throw-away PostgreSQL, on a unix socket in a folder of its own, and a schema of its own for each test."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import create_engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.schema import CreateSchema, DropSchema

from aggregator.broker import die_with_parent

START_S = 30.0
# It is thrown away: nothing of it need outlast a power cut.
_FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=16MB")
# PostgreSQL refuses to run as root; Debian's package makes the first of these users, every Linux has the second.
_USERS = ("postgres", "nobody")


class NoPostgres(Exception):
    """None can be started here; the message says why and what helps."""


@contextmanager
def throw_away_postgres() -> Iterator[str]:
    """The URL of a running one. Raises NoPostgres."""
    if importlib.util.find_spec("psycopg") is None:
        raise NoPostgres("the Python package psycopg is not installed: `make setup` does it")
    initdb, server = _program("initdb"), _program("postgres")
    owner = _owner()
    folder = Path(tempfile.mkdtemp(prefix="fleetgrad-pg-"))  # not pytest's: the other user must get into it
    try:
        if owner is not None:
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        data, log = folder / "data", folder / "log"
        words = ["--auth=trust", "--username=test", "--encoding=UTF8", "--locale=C", "--no-sync"]
        process = _spawn([initdb, *words, f"--pgdata={data}"], log, owner)
        if process.wait(START_S) != 0:
            raise NoPostgres(f"initdb fails: {log.read_text().strip()}")
        settings = ["listen_addresses=", f"unix_socket_directories={folder}", *_FAST]
        process = _spawn([server, "-D", str(data), *(w for s in settings for w in ("-c", s))], log, owner)
        try:
            url = URL.create("postgresql+psycopg", username="test", database="postgres")
            url = url.update_query_dict({"host": str(folder)})
            _await(url, process, log)
            yield url.render_as_string()
        finally:
            process.send_signal(signal.SIGQUIT)  # it ends at once, without a checkpoint
            process.wait(START_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def schema_of_its_own(url: str, name: str) -> Iterator[str]:
    """The URL with an empty schema as its only one; the schema is dropped afterwards."""
    engine = create_engine(url, connect_args={"options": "-c lock_timeout=10s"})
    try:
        with engine.begin() as connection:
            connection.execute(DropSchema(name, cascade=True, if_exists=True))
            connection.execute(CreateSchema(name))
        own = make_url(url).update_query_dict({"options": f"-c search_path={name}"})
        yield own.render_as_string(hide_password=False)
        with engine.begin() as connection:
            connection.execute(DropSchema(name, cascade=True))
    finally:
        engine.dispose()


def _program(name: str) -> str:
    """On the PATH, or where Debian puts it: not on the PATH."""
    versions = sorted(
        Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3])
    )
    found = shutil.which(name) or (str(versions[-1]) if versions else None)
    if found is None:
        raise NoPostgres(f"no {name} here: install postgresql, or set FLEETGRAD_TEST_POSTGRES_URL")
    return found


def _owner() -> pwd.struct_passwd | None:
    """Who runs it: ourselves (None) unless we are root."""
    if os.geteuid() != 0:
        return None
    known = {user.pw_name: user for user in pwd.getpwall()}
    for name in _USERS:
        if name in known:
            return known[name]
    raise NoPostgres("PostgreSQL does not run as root, and there is no user postgres or nobody")


def _spawn(command: list[str], log: Path, owner: pwd.struct_passwd | None) -> subprocess.Popen[bytes]:
    try:
        with log.open("ab") as out:
            return subprocess.Popen(
                command,
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                user=owner.pw_uid if owner else None,
                group=owner.pw_gid if owner else None,
                extra_groups=[] if owner else None,
                preexec_fn=die_with_parent(signal.SIGQUIT),
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise NoPostgres(f"{command[0]} cannot be started: {error}") from None


def _await(url: URL, process: subprocess.Popen[bytes], log: Path) -> None:
    engine = create_engine(url)
    deadline = time.monotonic() + START_S
    try:
        while True:
            try:
                engine.connect().close()
                return
            except OperationalError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise NoPostgres(f"postgres does not answer: {log.read_text().strip()}") from None
                time.sleep(0.02)
    finally:
        engine.dispose()
