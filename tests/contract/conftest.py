"""The PostgreSQL of the ledger's suite: the one that is named, or a throw-away one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Its URL: FLEETGRAD_TEST_POSTGRES_URL, where the tests make and drop schemas ``fleetgrad_test``."""
    if named := os.environ.get("FLEETGRAD_TEST_POSTGRES_URL"):
        yield named
        return
    # Here, since the device's suites run in environments without the server's libraries too.
    from tests.support.postgres import NoPostgres, throw_away_postgres

    try:
        with throw_away_postgres() as url:
            yield url
    except NoPostgres as error:
        pytest.skip(str(error))
