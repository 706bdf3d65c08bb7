from __future__ import annotations

from edge_runtime.protocol.rejects import Reject


def test_every_code_is_used_once_and_the_reserved_one_never() -> None:
    assert sorted(reject.code for reject in Reject) == [n for n in range(1, 29) if n != 12]


def test_a_code_that_is_unknown_or_reserved_reads_as_malformed() -> None:
    assert [Reject.from_code(code) for code in (0, 12, 99)] == [Reject.MALFORMED] * 3
    assert all(Reject.from_code(reject.code) is reject for reject in Reject)
