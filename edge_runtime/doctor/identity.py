"""Who this device is, and whether its state folder is whole."""

from __future__ import annotations

import time
from collections.abc import Iterator

from edge_runtime.device_status import DeviceState
from edge_runtime.doctor.check import Check, good, problem, warning
from edge_runtime.protocol.crypto.keys import VerifyKey
from edge_runtime.protocol.enrol_token import EnrolToken

_LONG_S = 86_400.0
_ENROL = (
    "edge-runtime enroll --config device.toml --device NAME --token-file FILE, with a token of the operator"
)
_ANEW = "move the folder away and enrol again with a new token, under a new device name"


def checks(state: DeviceState, key: VerifyKey | None, now: float) -> Iterator[Check]:
    """``key``: of the folder's identity; None: there is none."""
    if state.damaged:
        yield problem("state folder", "; ".join(state.damaged), f"check the disk; {_ANEW}")
    elif state.running is not None:
        yield good("state folder", f"whole; in use by process {state.running}")
    elif state.folder.is_dir():
        yield good("state folder", "whole, not in use")
    else:
        yield good("state folder", f"{state.folder} is made when the device enrols")
    yield _enrolment(state, key)
    yield _updates(state, now)


def token(found: EnrolToken, state: DeviceState) -> Check:
    """Whether a token is one, and for this federation; it is good for one device, and not used up by looking."""
    enrolment = state.enrolment
    if enrolment is not None and enrolment.federation != found.federation:
        return warning(
            "token",
            f"it is for federation {found.federation}, this folder belongs to {enrolment.federation}",
            "use another state_folder for another federation",
        )
    name = f", for the name {found.device}" if found.device else ""
    return good(
        "token", f"of federation {found.federation}{name}; only the registrar knows whether it expired"
    )


def _enrolment(state: DeviceState, key: VerifyKey | None) -> Check:
    enrolment, certificate = state.enrolment, state.certificate
    if enrolment is None:
        if any("enrolment" in text for text in state.damaged):
            return problem("enrolment", "it cannot be read", _ANEW)
        return warning("enrolment", "not enrolled yet", _ENROL)
    if certificate is None:
        return problem("enrolment", "the certificate does not verify under the root key kept with it", _ANEW)
    if key is None or key.raw != certificate.signing_key:
        missing = "the device's key is gone" if key is None else "the certificate is for another key"
        return problem("enrolment", f"{missing}: the folder is mixed from two", _ANEW)
    return good(
        "enrolment",
        f"{enrolment.device} of {enrolment.federation}, signed by the root, epoch {certificate.epoch}",
    )


def _updates(state: DeviceState, now: float) -> Check:
    if state.lost_updates:
        return warning(
            "outbox",
            f"{state.lost_updates} damaged updates were set aside in {state.folder / 'outbox'}",
            "check the disk; then delete them: their rounds are over",
        )
    for entry in state.pending:
        waiting_s = now - entry.since
        told = f"the update of round {entry.round_id.number} ({entry.size} bytes)"
        if waiting_s > _LONG_S:
            since = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(entry.since))
            return warning(
                "outbox",
                f"{told} waits for its receipt since {since}",
                "let `edge-runtime run` go on; the operator sees with `aggregator status` whether rounds proceed",
            )
        return good("outbox", f"{told} waits for its receipt")
    return good("outbox", "no update waits for its receipt")
