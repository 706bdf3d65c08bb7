"""The life of a round and of an update, once: phases, verdicts, outcomes and the moves between them."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """Where a round stands. ``MOVES`` holds the only allowed successors."""

    COLLECTING = "collecting"  # the manifest is out; updates are stored
    FROZEN = "frozen"  # the accepted set is fixed
    AGGREGATED = "aggregated"  # the new version is committed
    PUBLISHED = "published"  # the version's files are in place; the round's private key is gone
    ABORTED = "aborted"  # too few updates, or the operator rolled back; it made no version


MOVES: dict[Phase, tuple[Phase, ...]] = {
    Phase.COLLECTING: (Phase.FROZEN, Phase.ABORTED),
    Phase.FROZEN: (Phase.AGGREGATED, Phase.ABORTED),
    Phase.AGGREGATED: (Phase.PUBLISHED,),
    Phase.PUBLISHED: (),
    Phase.ABORTED: (),
}


class Verdict(Enum):
    """What a receipt says of an update; the value is the wire code."""

    STORED = 1  # durable, and will get exactly one outcome
    LATE = 2  # the round no longer takes updates; drop it
    REJECTED = 3  # never acceptable as it is; drop it


class Outcome(Enum):
    """What became of a stored update: exactly one of these."""

    AGGREGATED = "aggregated"  # it is in the version of its round exactly once
    EXCLUDED = (
        "excluded"  # stored, but its device was evicted before the freeze, or it could not be read back
    )
    ABORTED = "aborted"  # its round made no version


class FederationState(Enum):
    """What a manifest announces; the value is the wire code."""

    WAITING = 1  # no round is open yet: check in
    COLLECTING = 2
    FINISHED = 3
