"""Why a message is refused. One table: the wire, the counters, the logs and the documentation read it."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from edge_runtime.protocol.faults import Fault


class _Row(NamedTuple):
    code: int
    fault: Fault
    meaning: str
    remedy: str


class Reject(Enum):
    """A refusal: ``code`` travels on the wire; codes are for ever. 12 is reserved: never sent, not to be used."""

    MALFORMED = _Row(
        1, Fault.PEER, "the bytes are not a message of this protocol", "update the sender's software"
    )
    TOO_LARGE = _Row(
        2, Fault.PEER, "a length is above the bound of its kind", "check the plan and the sender's software"
    )
    WRONG_FEDERATION = _Row(
        3, Fault.ENGINEER, "the message belongs to another federation", "check the device's enrolment"
    )
    WRONG_TOPIC = _Row(
        4, Fault.PEER, "the topic does not belong to the sender or the kind", "check the broker's ACLs"
    )
    UNKNOWN_DEVICE = _Row(
        5,
        Fault.ENGINEER,
        "no certificate of this device has been seen",
        "enrol the device, or let it check in",
    )
    BAD_SIGNATURE = _Row(
        6, Fault.PEER, "the signature does not verify", "check the keys; the message may be forged"
    )
    BAD_CERTIFICATE = _Row(
        7, Fault.ENGINEER, "the certificate is not signed by the root, or not for this use", "enrol again"
    )
    BAD_SEAL = _Row(
        8,
        Fault.PEER,
        "the sealed body cannot be opened",
        "check the manifest's key and the sender's software",
    )
    BAD_DIGEST = _Row(
        9,
        Fault.SURROUNDINGS,
        "the content does not have the digest it was announced with",
        "fetch or send it again",
    )
    REPLAYED = _Row(
        10, Fault.PEER, "the sequence number has been seen before", "a replay or a cloned state folder"
    )
    WRONG_ROUND = _Row(11, Fault.NOBODY, "the round is not the open one", "wait for the next manifest")
    WRONG_MANIFEST = _Row(
        13,
        Fault.NOBODY,
        "the message speaks about another manifest of this round",
        "fetch the manifest again",
    )
    NOT_SELECTED = _Row(
        14, Fault.NOBODY, "the device is not in the cohort of this round", "wait to be selected"
    )
    CONFLICTING = _Row(
        15,
        Fault.ENGINEER,
        "another update of this device for this round is stored",
        "check for a cloned state folder",
    )
    WRONG_SIZE = _Row(
        16,
        Fault.ENGINEER,
        "the vector does not have the parameter count of the manifest",
        "fetch the artifact again",
    )
    NOT_FINITE = _Row(
        17,
        Fault.MODELLER,
        "the vector holds NaN or infinity",
        "lower the learning rate; check the local data",
    )
    OUT_OF_RANGE = _Row(
        18,
        Fault.MODELLER,
        "a value is outside the bounds of the plan",
        "lower the learning rate; check the data",
    )
    UNKNOWN_CODEC = _Row(
        19, Fault.ENGINEER, "the codec is not one the plan accepts", "update the sender's software"
    )
    BAD_ENCODING = _Row(20, Fault.PEER, "the encoded vector does not decode", "update the sender's software")
    BAD_TOKEN = _Row(
        21,
        Fault.ENGINEER,
        "the enrolment token is unknown or its secret is wrong",
        "ask the operator for a new token",
    )
    TOKEN_USED = _Row(
        22, Fault.ENGINEER, "the enrolment token was used by another key", "ask the operator for a new token"
    )
    TOKEN_EXPIRED = _Row(
        23, Fault.OPERATOR, "the enrolment token has expired", "ask the operator for a new token"
    )
    NAME_TAKEN = _Row(
        24, Fault.ENGINEER, "another key is enrolled under this device name", "enrol under another name"
    )
    UNKNOWN_BLOB = _Row(25, Fault.NOBODY, "no such content is offered", "wait for the next manifest")
    UNEXPECTED_KIND = _Row(
        26, Fault.PEER, "this kind of message is not accepted here", "check the sender's software"
    )

    REVOKED = _Row(
        27,
        Fault.OPERATOR,
        "the device's certificate was revoked",
        "enrol again, with a new token and state_folder; ask the operator why",
    )
    EVICTED = _Row(
        28,
        Fault.OPERATOR,
        "the operator excluded the device",
        "ask the operator: aggregator readmit undoes it",
    )

    @property
    def code(self) -> int:
        return self.value.code

    @property
    def fault(self) -> Fault:
        return self.value.fault

    @property
    def meaning(self) -> str:
        return self.value.meaning

    @property
    def remedy(self) -> str:
        return self.value.remedy

    @classmethod
    def from_code(cls, code: int) -> Reject:
        """The reject with this wire code; an unknown code (a newer peer) reads as MALFORMED."""
        return _BY_CODE.get(code, cls.MALFORMED)


_BY_CODE = {reject.code: reject for reject in Reject}
