"""What a device is asked to do in a round, and how its answer will be counted."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.protocol import wire_pb2 as wire
from edge_runtime.protocol.parsing import codec_names, finite, malformed, within


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Exactly one of ``epochs`` and ``steps`` is positive.

    beta: an update weighs (n_k / sample_cap)^(1+beta), n_k capped; 0 is FedAvg (arXiv 1602.05629).
    max_grad_norm: L2 bound of the gradient per step, 0 for none.
    max_abs_delta: an update with a larger coordinate is refused; with ``scale_bits`` it makes overflow impossible.
    scale_bits: fractional bits of the fixed-point sum (``fixed_point``).
    codecs: accepted names, best first (``codecs``).
    """

    epochs: int = 1
    steps: int = 0
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    max_grad_norm: float = 5.0
    beta: float = 0.0
    sample_cap: int = 10_000
    max_abs_delta: float = 64.0
    scale_bits: int = 0
    codecs: tuple[str, ...] = ("int8-block+zstd", "int8-block+zlib")

    def problem(self) -> str | None:
        """What is wrong with this plan, in words for its author; None if nothing is."""
        checks = (
            ((self.epochs > 0) != (self.steps > 0), "exactly one of epochs and steps must be positive"),
            (0 <= self.epochs <= 10_000, "epochs must be 0..10000"),
            (0 <= self.steps <= 100_000_000, "steps must be 0..100000000"),
            (1 <= self.batch_size <= 1 << 20, "batch_size must be 1..1048576"),
            (0 < self.learning_rate <= 1e6, "learning_rate must be above 0 and at most 1e6"),
            (0 <= self.momentum < 1, "momentum must be at least 0 and below 1"),
            (0 <= self.max_grad_norm <= 1e9, "max_grad_norm must be 0 (off) or positive"),
            (-1 <= self.beta <= 8, "beta must be -1..8"),
            (1 <= self.sample_cap <= 1 << 40, "sample_cap must be at least 1"),
            (0 < self.max_abs_delta <= 1e6, "max_abs_delta must be above 0 and at most 1e6"),
            (0 <= self.scale_bits <= 60, "scale_bits must be 0..60"),
            (len(self.codecs) > 0, "codecs must name at least one codec"),
        )
        return next((text for holds, text in checks if not holds), None)

    def to_wire(self) -> wire.Plan:
        return wire.Plan(**self.__dict__)

    @classmethod
    def from_wire(cls, m: wire.Plan) -> Plan:
        """Raises RemoteProtocolError(MALFORMED) unless every value is within its bounds."""
        plan = cls(
            epochs=within("epochs", m.epochs, 0, 10_000),
            steps=m.steps,
            batch_size=m.batch_size,
            learning_rate=finite("learning_rate", m.learning_rate),
            momentum=finite("momentum", m.momentum),
            max_grad_norm=finite("max_grad_norm", m.max_grad_norm),
            beta=finite("beta", m.beta),
            sample_cap=m.sample_cap,
            max_abs_delta=finite("max_abs_delta", m.max_abs_delta),
            scale_bits=m.scale_bits,
            codecs=codec_names(m.codecs),
        )
        if problem := plan.problem():
            raise malformed(problem)
        return plan
