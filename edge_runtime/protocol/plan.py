"""What a device is asked to do in a round, and how its answer will be counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from edge_runtime.protocol import wire_pb2 as wire
from edge_runtime.protocol.parsing import codec_names, finite, malformed, within
from edge_runtime.protocol.schedules import Schedule

# What a plan may name, and the graphs of an artifact that do it: Adam and AdamW differ in their scalars only.
OPTIMIZERS: Mapping[str, str] = MappingProxyType({"sgd": "sgd", "adam": "adam", "adamw": "adam"})
MAX_ADAM_BETA = 0.999999  # the next float32 are so near 1 that a bias correction of 0 would divide


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Exactly one of ``epochs`` and ``steps`` is positive.

    learning_rate: of version 0; ``schedule`` says what of it is left later.
    optimizer: one of OPTIMIZERS, with torch.optim's arithmetic; its state is zero when a round begins.
        momentum, nesterov: of sgd. adam_beta1, adam_beta2, adam_epsilon: of adam and adamw (arXiv 1412.6980).
    weight_decay: sgd, adam: L2, added to the clipped gradient; adamw: decoupled (arXiv 1711.05101).
    beta: an update weighs (n_k / sample_cap)^(1+beta), n_k capped; 0 is FedAvg (arXiv 1602.05629).
    max_grad_norm: L2 bound of the gradient per step, 0 for none.
    max_abs_delta: an update with a larger coordinate is refused; with ``scale_bits`` it makes overflow impossible.
    scale_bits: fractional bits of the fixed-point sum (``fixed_point``).
    codecs: accepted names, best first (``codecs``).
    """

    epochs: int = 1
    steps: int = 0
    batch_size: int = 32
    optimizer: str = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    schedule: Schedule = field(default_factory=Schedule)
    max_grad_norm: float = 5.0
    beta: float = 0.0
    sample_cap: int = 10_000
    max_abs_delta: float = 64.0
    scale_bits: int = 0
    codecs: tuple[str, ...] = ("int8-block+zstd", "int8-block+zlib")

    def learning_rate_at(self, version: int) -> float:
        """Of training that starts from ``version``, the number of models made before."""
        return self.learning_rate * self.schedule.at(version)

    def problem(self) -> str | None:
        """What is wrong with this plan, in words for its author; None if nothing is."""
        checks = (
            ((self.epochs > 0) != (self.steps > 0), "exactly one of epochs and steps must be positive"),
            (0 <= self.epochs <= 10_000, "epochs must be 0..10000"),
            (0 <= self.steps <= 100_000_000, "steps must be 0..100000000"),
            (1 <= self.batch_size <= 1 << 20, "batch_size must be 1..1048576"),
            (self.optimizer in OPTIMIZERS, f"optimizer must be one of {', '.join(OPTIMIZERS)}"),
            (0 < self.learning_rate <= 1e6, "learning_rate must be above 0 and at most 1e6"),
            (0 <= self.momentum < 1, "momentum must be at least 0 and below 1"),
            (
                not self.nesterov or (self.optimizer == "sgd" and self.momentum > 0),
                "nesterov needs the optimizer sgd and a momentum above 0",
            ),
            (0 <= self.weight_decay <= 100, "weight_decay must be 0..100"),
            (0 <= self.adam_beta1 <= MAX_ADAM_BETA, f"adam_beta1 must be 0..{MAX_ADAM_BETA}"),
            (0 <= self.adam_beta2 <= MAX_ADAM_BETA, f"adam_beta2 must be 0..{MAX_ADAM_BETA}"),
            (1e-16 <= self.adam_epsilon <= 1, "adam_epsilon must be 1e-16..1"),
            (0 <= self.max_grad_norm <= 1e9, "max_grad_norm must be 0 (off) or positive"),
            (-1 <= self.beta <= 8, "beta must be -1..8"),
            (1 <= self.sample_cap <= 1 << 40, "sample_cap must be at least 1"),
            (0 < self.max_abs_delta <= 1e6, "max_abs_delta must be above 0 and at most 1e6"),
            (0 <= self.scale_bits <= 60, "scale_bits must be 0..60"),
            (len(self.codecs) > 0, "codecs must name at least one codec"),
        )
        return next((text for holds, text in checks if not holds), None) or self.schedule.problem()

    def to_wire(self) -> wire.Plan:
        schedule = None if self.schedule == Schedule() else self.schedule.to_wire()
        return wire.Plan(**{**self.__dict__, "schedule": schedule})

    @classmethod
    def from_wire(cls, m: wire.Plan) -> Plan:
        """Raises RemoteProtocolError(MALFORMED) unless every value is within its bounds."""
        plan = cls(
            epochs=within("epochs", m.epochs, 0, 10_000),
            steps=m.steps,
            batch_size=m.batch_size,
            optimizer=m.optimizer,
            learning_rate=finite("learning_rate", m.learning_rate),
            momentum=finite("momentum", m.momentum),
            nesterov=m.nesterov,
            weight_decay=finite("weight_decay", m.weight_decay),
            adam_beta1=finite("adam_beta1", m.adam_beta1),
            adam_beta2=finite("adam_beta2", m.adam_beta2),
            adam_epsilon=finite("adam_epsilon", m.adam_epsilon),
            schedule=Schedule.from_wire(m.schedule),
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
