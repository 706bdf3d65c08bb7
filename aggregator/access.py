"""Who may write and read which topic at the broker, derived from the table of kinds and the grammar of topics.

The broker is trusted with nothing: a message counts by its signature alone. These rules keep model and manifests
from strangers, and save everybody the work of refusing forged messages.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from edge_runtime.protocol import topics
from edge_runtime.protocol.ids import DeviceId, Digest, FederationId
from edge_runtime.protocol.kinds import Direction, Kind, Signer

OWN = "%u"
"""In a pattern: the level that must be the reader's or writer's own name, as mosquitto spells it."""

_ANY = DeviceId("+")
_MINE = DeviceId(OWN)


class Role(Enum):
    """Who connects. The value is the MQTT user name, which is the common name of the client's certificate.

    A device's is its device name, whose alphabet has no ``@``.
    """

    DEVICE = OWN
    AGGREGATOR = "@aggregator"
    REGISTRAR = "@registrar"
    OBSERVER = "@observer"  # dashboards: sees which round is open and who is there


class Action(Enum):
    WRITE = "write"
    READ = "read"


class Rule(NamedTuple):
    """``role`` may do ``action`` on topics that match ``pattern``. ``why``: what travels there."""

    role: Role
    action: Action
    pattern: str
    why: str


class _Lane(NamedTuple):
    """One line of the topic grammar, as a device sees it (``OWN``) and as all others do."""

    of_device: str
    of_others: str


def rules(federation: FederationId) -> tuple[Rule, ...]:
    """Everything anybody may do; all else is refused. In the order of roles, writing before reading."""
    found: dict[tuple[Role, Action, str], list[str]] = {}

    def allow(role: Role, action: Action, lane: _Lane, why: str) -> None:
        pattern = lane.of_device if role is Role.DEVICE else lane.of_others
        found.setdefault((role, action, pattern), []).append(why)

    for kind in Kind:
        for lane in _lanes(kind, federation):
            allow(_WRITER[kind.signer], Action.WRITE, lane, kind.label)
            for role in _readers(kind):
                allow(role, Action.READ, lane, kind.label)
    presence = _Lane(topics.presence(federation, _MINE), topics.presence(federation, _ANY))
    allow(Role.DEVICE, Action.WRITE, presence, "presence")
    allow(Role.OBSERVER, Action.READ, presence, "presence")
    order = [(role, action) for role in Role for action in Action]
    allowed = [Rule(*key, ", ".join(why)) for key, why in found.items()]
    return tuple(sorted(allowed, key=lambda rule: (order.index((rule.role, rule.action)), rule.pattern)))


def kept_from(role: Role, federation: FederationId) -> tuple[str, ...]:
    """What a broker must deny ``role`` by name, if it takes the rules of devices for rules of every user.

    Not what the role has a rule of its own for: the aggregator may then also read what it says to all.
    """
    own = {rule.pattern for rule in rules(federation) if rule.role is role}
    patterns = {rule.pattern for rule in rules(federation) if rule.role is Role.DEVICE}
    return tuple(sorted(pattern.replace(OWN, role.value) for pattern in patterns - own))


_WRITER = {
    Signer.DEVICE: Role.DEVICE,
    Signer.AGGREGATOR: Role.AGGREGATOR,
    Signer.ROOT: Role.REGISTRAR,
    Signer.CONTENT: Role.AGGREGATOR,
}


def _readers(kind: Kind) -> tuple[Role, ...]:
    match kind.direction:
        case Direction.UP:
            return (Role.REGISTRAR,) if kind is Kind.ENROL else (Role.AGGREGATOR,)
        case Direction.DOWN:
            return (Role.DEVICE,)
        case Direction.BROADCAST:
            return (Role.DEVICE, Role.OBSERVER)


def _lanes(kind: Kind, federation: FederationId) -> tuple[_Lane, ...]:
    """Where a kind travels. What proves itself by its digest is also published once for all, below ``b/``."""
    match kind.direction:
        case Direction.UP:
            others = topics.all_enrol(federation) if kind is Kind.ENROL else topics.all_up(federation)
            return (_Lane(others.removesuffix("+") + OWN, others),)
        case Direction.DOWN:
            down = _Lane(topics.down(federation, _MINE), topics.down(federation, _ANY))
            if kind.signer is not Signer.CONTENT:
                return (down,)
            one_piece = topics.blob_piece(federation, Digest(bytes(32)), None)
            pieces = one_piece.rsplit("/", 2)[0] + "/+/+"
            return (down, _Lane(pieces, pieces))
        case Direction.BROADCAST:
            return (_Lane(topics.manifest(federation), topics.manifest(federation)),)
