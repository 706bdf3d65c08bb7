"""One frozen dataclass per message body, to and from ``wire.proto``; whatever decodes is within its bounds.

``decode`` takes any bytes and raises RemoteProtocolError, nothing else. ``encode`` is deterministic here, but
receivers hash and verify the bytes they got: protobuf has more than one spelling of the same message.
Certificates and enrolment are in ``identities``, the manifest in ``manifest``.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.protocol import wire_pb2 as wire
from edge_runtime.protocol.ids import Digest, digest
from edge_runtime.protocol.parsing import codec_names, finite, malformed, parse, within
from edge_runtime.protocol.rejects import Reject
from edge_runtime.protocol.rounds import Verdict

MAX_SAMPLES = 1 << 40
MAX_TTL_S = 7 * 24 * 3600


@dataclass(frozen=True, kw_only=True)
class CheckIn:
    """One ticket for one selection. ``ttl_s`` (seconds, from arrival) bounds how long it may be used.

    ``samples`` is 0 while the device has not seen the model its data must fit.
    """

    certificate: bytes
    ttl_s: int
    samples: int
    free_memory_bytes: int
    codecs: tuple[str, ...]
    runtime: str

    def encode(self) -> bytes:
        return wire.CheckIn(
            certificate=self.certificate,
            ttl_s=self.ttl_s,
            samples=self.samples,
            free_memory_bytes=self.free_memory_bytes,
            codecs=self.codecs,
            runtime=self.runtime,
        ).SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, raw: bytes) -> CheckIn:
        m = parse(wire.CheckIn, raw)
        if len(m.runtime) > 100:
            raise malformed("runtime is longer than 100 characters")
        return cls(
            certificate=m.certificate,
            ttl_s=within("ttl_s", m.ttl_s, 1, MAX_TTL_S),
            samples=within("samples", m.samples, 0, MAX_SAMPLES),
            free_memory_bytes=m.free_memory_bytes,
            codecs=codec_names(m.codecs),
            runtime=m.runtime,
        )


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """``wave``: publish the blob once for all; otherwise send the named pieces to me (pull)."""

    digest: Digest
    wave: bool
    want_index: bool = False
    chunks: tuple[int, ...] = ()

    def encode(self) -> bytes:
        return wire.Fetch(
            digest=self.digest, wave=self.wave, want_index=self.want_index, chunks=self.chunks
        ).SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, raw: bytes) -> Fetch:
        m = parse(wire.Fetch, raw)
        return cls(digest=digest(m.digest), wave=m.wave, want_index=m.want_index, chunks=tuple(m.chunks))


@dataclass(frozen=True, kw_only=True)
class Update:
    """The content of a sealed update.

    ``delta``: the encoded float32 vector of shape (parameter_count,), new minus old parameters.
    """

    samples: int
    steps: int
    loss_first: float
    loss_last: float
    codec: str
    delta: bytes
    parameter_count: int

    def encode(self) -> bytes:
        return wire.Update(
            samples=self.samples,
            steps=self.steps,
            loss_first=self.loss_first,
            loss_last=self.loss_last,
            codec=self.codec,
            delta=self.delta,
            parameter_count=self.parameter_count,
        ).SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, raw: bytes) -> Update:
        m = parse(wire.Update, raw)
        (codec,) = codec_names([m.codec])
        return cls(
            samples=within("samples", m.samples, 1, MAX_SAMPLES),
            steps=within("steps", m.steps, 1, (1 << 32) - 1),
            loss_first=finite("loss_first", m.loss_first),
            loss_last=finite("loss_last", m.loss_last),
            codec=codec,
            delta=m.delta,
            parameter_count=m.parameter_count,
        )


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """What a device says of itself after a round; 0 means unknown or switched off by its owner."""

    train_s: float = 0.0
    steps: int = 0
    samples: int = 0
    peak_memory_bytes: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    temperature_c: float = 0.0
    resends: int = 0

    def encode(self) -> bytes:
        return wire.Telemetry(**self.__dict__).SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, raw: bytes) -> Telemetry:
        m = parse(wire.Telemetry, raw)
        return cls(
            train_s=finite("train_s", m.train_s),
            steps=m.steps,
            samples=m.samples,
            peak_memory_bytes=m.peak_memory_bytes,
            bytes_up=m.bytes_up,
            bytes_down=m.bytes_down,
            temperature_c=finite("temperature_c", m.temperature_c),
            resends=m.resends,
        )


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """``capped``: the sample count reached the plan's cap and counts as the cap; the count itself is not told."""

    verdict: Verdict
    reject: Reject | None
    update_digest: Digest
    capped: bool = False

    def encode(self) -> bytes:
        return wire.Receipt(
            verdict=self.verdict.value,
            reject=self.reject.code if self.reject else 0,
            update_digest=self.update_digest,
            capped=self.capped,
        ).SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, raw: bytes) -> Receipt:
        m = parse(wire.Receipt, raw)
        within("verdict", m.verdict, 1, len(Verdict))
        verdict = Verdict(m.verdict)
        if (m.reject != 0) != (verdict is Verdict.REJECTED):
            raise malformed("a receipt names a reject if and only if it rejects")
        return cls(
            verdict=verdict,
            reject=Reject.from_code(m.reject) if m.reject else None,
            update_digest=digest(m.update_digest),
            capped=m.capped,
        )


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One piece of a blob; ``index`` is None for the blob's index (see ``chunks.BlobIndex``)."""

    digest: Digest
    index: int | None
    content: bytes

    def encode(self) -> bytes:
        return wire.Chunk(
            digest=self.digest, is_index=self.index is None, index=self.index or 0, content=self.content
        ).SerializeToString(deterministic=True)

    @classmethod
    def decode(cls, raw: bytes) -> Chunk:
        m = parse(wire.Chunk, raw)
        return cls(digest=digest(m.digest), index=None if m.is_index else m.index, content=m.content)
