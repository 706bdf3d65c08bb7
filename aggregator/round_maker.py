"""Opening a round: its key, cohort, blobs and signed manifest. And the manifests of a federation at rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from aggregator.blob_server import BlobServer
from aggregator.core.events import PrepareRound
from aggregator.core.records import RoundOpened
from aggregator.round_keys import RoundKeys
from aggregator.work import Outgoing
from edge_runtime.protocol import certificates, topics
from edge_runtime.protocol.artifact import MANIFEST_FILE, Artifact, device_bundle
from edge_runtime.protocol.chunks import index_bytes
from edge_runtime.protocol.crypto.keys import SealingPrivateKey, SigningKey, VerifyKey
from edge_runtime.protocol.crypto.provider import CryptoProvider
from edge_runtime.protocol.envelope import Header, pack
from edge_runtime.protocol.errors import Fault, FleetgradError, RemoteProtocolError
from edge_runtime.protocol.fixed_point import max_scale_bits
from edge_runtime.protocol.ids import DeviceId, Digest, FederationId, RoundId, sha256
from edge_runtime.protocol.kinds import Kind
from edge_runtime.protocol.manifest import BlobRef, Cohort, Manifest
from edge_runtime.protocol.messages import Receipt
from edge_runtime.protocol.plan import OPTIMIZERS, Plan
from edge_runtime.protocol.rounds import FederationState
from edge_runtime.protocol.tensors import Vector, vector_to_bytes


class CertificateError(
    FleetgradError, fault=Fault.OPERATOR, remedy="make a new certificate with `aggregator registrar certify`"
):
    """The aggregator's certificate does not fit its keys, federation, generation or rounds."""


class ArtifactChanged(
    FleetgradError, fault=Fault.OPERATOR, remedy="put the former artifact back until the open round is over"
):
    """The artifact of the settings is not the one that the open round trains."""


class OptimizerMissing(
    FleetgradError,
    fault=Fault.OPERATOR,
    remedy="choose another plan.optimizer, or build the artifact again with `model-export build`",
):
    """The artifact has no training graphs for the optimizer of the plan."""


class ChunksTooSmall(FleetgradError, fault=Fault.OPERATOR, remedy="double [delivery] chunk_bytes"):
    """A blob's index would not fit the packets that its chunks fit."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who the aggregator is. ``certificate``: as it travels; ``root``: the registrar's key."""

    federation: FederationId
    generation: int
    signing_key: SigningKey
    sealing_key: SealingPrivateKey
    certificate: bytes
    root: VerifyKey

    def check(self, provider: CryptoProvider, round_number: int) -> None:
        """Raises CertificateError unless devices will accept what we sign in this round."""
        remedy = "make a new one: `aggregator registrar certify --help`"
        try:
            certificate = certificates.check_aggregator(
                provider, self.root, self.certificate, self.federation, RoundId(self.generation, round_number)
            )
        except RemoteProtocolError as error:
            raise CertificateError(f"the aggregator's certificate is refused ({error}); {remedy}") from error
        ours = (
            provider.verify_key(self.signing_key).raw,
            provider.sealing_public_key(self.sealing_key).raw,
        )
        if (certificate.signing_key, certificate.sealing_key) != ours:
            raise CertificateError(f"the aggregator's certificate is for other keys; {remedy}")


@dataclass(kw_only=True)
class RoundMaker:
    """``plan``: what rounds to come ask of their devices; the scale of the sum follows from each cohort."""

    identity: Identity
    provider: CryptoProvider
    plan: Plan
    artifact: Artifact
    blobs: BlobServer
    keys: RoundKeys
    entropy: Callable[[int], bytes]

    def __post_init__(self) -> None:
        known = self.artifact.manifest.optimizers
        if OPTIMIZERS[self.plan.optimizer] not in known:
            raise OptimizerMissing(
                f"plan.optimizer is {self.plan.optimizer!r}, the artifact {self.artifact.manifest.name!r} has "
                f"graphs of {', '.join(known)} only: choose one of them, or build the artifact again"
            )
        files = {**self.artifact.files, MANIFEST_FILE: self.artifact.manifest.to_bytes()}
        self._bundle = device_bundle(files)
        largest = max(len(self._bundle), 4 * self.artifact.manifest.parameter_count)
        if (needed := index_bytes(largest, self.blobs.chunk_bytes)) > self.blobs.chunk_bytes:
            raise ChunksTooSmall(
                f"the list of chunks of {largest} bytes has {needed} bytes and must fit one chunk of "
                f"{self.blobs.chunk_bytes}: double [delivery] chunk_bytes"
            )

    def prepare(self, effect: PrepareRound, theta: Vector) -> RoundOpened:
        """The round's key on disk, its blobs on offer, its manifest signed. Raises CertificateError."""
        self.identity.check(self.provider, effect.round_id.number)
        key = self.keys.create(effect.round_id)
        cohort = self.blobs.offer(Cohort(devices=effect.cohort).encode())
        bits = max_scale_bits(len(effect.cohort), self.plan.max_abs_delta)
        manifest = self._manifest(
            effect.round_id,
            FederationState.COLLECTING,
            effect.base_version,
            theta,
            dataclasses.replace(self.plan, scale_bits=bits),
            deadline=effect.deadline,
            cohort=cohort,
            selected=len(effect.cohort),
            sealing_key=self.provider.sealing_public_key(key).raw,
        )
        self.blobs.withdraw_all_but({cohort.digest, manifest.model.digest, manifest.artifact.digest})
        signed, digest = self._signed(manifest)
        return RoundOpened(
            round_id=effect.round_id,
            base_version=effect.base_version,
            cohort=effect.cohort,
            deadline=effect.deadline,
            manifest=signed,
            manifest_digest=digest,
        )

    def offer_again(self, manifest: Manifest, cohort: Iterable[DeviceId], theta: Vector) -> None:
        """After a restart: the blobs of the open round. Raises ArtifactChanged if they are no longer to be had."""
        devices = tuple(sorted(cohort))
        self.blobs.offer(Cohort(devices=devices).encode())
        self.blobs.offer(vector_to_bytes(theta), expected=len(devices))
        if self.blobs.offer(self._bundle) != manifest.artifact:
            raise ArtifactChanged(
                f"round {manifest.round_id.number} is open and trains another artifact than the settings name: "
                "put that one back until the round is over"
            )

    def at_rest(self, round_id: RoundId, state: FederationState, version: int, theta: Vector) -> bytes:
        """The signed manifest of a federation that waits for devices, or is finished."""
        self.identity.check(self.provider, round_id.number)
        return self._signed(self._manifest(round_id, state, version, theta, self.plan))[0]

    def receipt(
        self, device: DeviceId, round_id: RoundId, manifest: Digest | None, receipt: Receipt
    ) -> Outgoing:
        """A signed receipt on its way to its device."""
        body = receipt.encode()
        header = Header(
            kind=Kind.RECEIPT,
            federation=self.identity.federation,
            round_id=round_id,
            manifest_digest=manifest,
            device=device,
            payload_digest=sha256(body),
        )
        (payload,) = pack(header, body, self._sign)
        return Outgoing(topics.down(self.identity.federation, device), payload)

    def _manifest(
        self,
        round_id: RoundId,
        state: FederationState,
        version: int,
        theta: Vector,
        plan: Plan,
        *,
        deadline: float = 0.0,
        cohort: BlobRef | None = None,
        selected: int = 0,
        sealing_key: bytes = b"",
    ) -> Manifest:
        return Manifest(
            federation=self.identity.federation,
            round_id=round_id,
            state=state,
            base_version=version,
            deadline_unix_ms=int(deadline * 1000),
            plan=plan,
            model=self.blobs.offer(vector_to_bytes(theta), expected=selected),
            artifact=self.blobs.offer(self._bundle),
            cohort=cohort,
            sealing_key=sealing_key,
            chunk_bytes=self.blobs.chunk_bytes,
            certificate=self.identity.certificate,
            parameter_count=theta.size,
        )

    def _signed(self, manifest: Manifest) -> tuple[bytes, Digest]:
        body = manifest.encode()
        header = Header(
            kind=Kind.MANIFEST,
            federation=self.identity.federation,
            round_id=manifest.round_id,
            payload_digest=sha256(body),
        )
        (payload,) = pack(header, body, self._sign)
        return payload, sha256(body)

    def _sign(self, message: bytes) -> bytes:
        return self.provider.sign(self.identity.signing_key, message)
