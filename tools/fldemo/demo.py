"""One run from an empty folder to judged figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.backends.artifact_folder import read_artifact_folder
from edge_runtime.protocol.artifact import Artifact
from fldemo.baselines import train_baselines
from fldemo.data import Split
from fldemo.evaluation import Evaluator
from fldemo.examples import Example
from fldemo.federation import BROKER, ENVIRONMENT, DemoError, Federation, Folders, Run
from fldemo.figures import Figures, Spread, memory_figures, model_files, round_seconds
from fldemo.memory import MemorySampler
from fldemo.processes import Supervisor, program
from fldemo.scenario import DEVICES, GOAL, Round, sample_passes
from fldemo.verify import Check, verify


@dataclass(frozen=True, kw_only=True)
class Options:
    """``broker``: one of ``aggregator.broker.KINDS``; None for the first that is installed."""

    example: Example
    folder: Path
    seed: int
    rounds: int
    export: bool = False
    broker: str | None = None


@dataclass(frozen=True, kw_only=True)
class Observer:
    """Who is told of the progress: a sentence for each stage, and every round that ended."""

    say: Callable[[str], None]
    on_round: Callable[[Round], None]


@dataclass(frozen=True)
class Result:
    """``checks``: any that does not hold makes the demo fail."""

    figures: Figures
    checks: tuple[Check, ...]
    rounds: tuple[Round, ...]


def run_demo(options: Options, observer: Observer) -> Result:
    """Everything, in ``options.folder``, which is empty. No child process outlives this call, however it ends.

    Call it from the main thread. Raises FleetgradError, its text made for the user.
    """
    started = time.monotonic()
    folders, memory = Folders(options.folder), MemorySampler()
    example = options.example
    split = example.load(len(DEVICES), options.seed)
    with ExitStack() as stack:
        supervisor = stack.enter_context(Supervisor(folders.logs, ENVIRONMENT))
        artifact_folder = (
            _export(supervisor, folders, example) if options.export else example_folder(example) / "artifact"
        )
        artifact = read_artifact_folder(artifact_folder)
        evaluator = Evaluator(artifact, split.held_out, example.metric)
        federation = Federation(folders, supervisor, memory)
        broker = federation.start_broker(options.broker, observer.say)
        stack.callback(broker.stop)
        stack.callback(supervisor.stop_all)  # before the broker
        observer.say(f"{broker.kind} runs at {broker.url}; ten devices enrol, logs are in {folders.logs}")
        federation.set_up(artifact_folder, split, example, options.seed, options.rounds)
        federation.start()
        memory.start()
        stack.callback(memory.stop)
        observer.say("the aggregator and ten devices start; two of them will be killed")

        def on_round(round_: Round) -> None:
            arrays = folders.version(round_.version) / "model.npz"
            if round_.published and arrays.is_file():
                round_.score = evaluator.of_npz(arrays)
            observer.on_round(round_)

        run = federation.follow(on_round)
        memory.stop()
        federation.finish(run)
        kind = broker.kind
    observer.say("training the baselines: all data in one place, and each device alone")
    figures = _figures(options, run, memory, kind, artifact, split, evaluator, folders, started)
    return Result(figures, verify(figures, run, options.rounds, example.limit_points), tuple(run.rounds))


def example_folder(example: Example) -> Path:
    """``examples/<name>`` of the source tree. Raises DemoError where only the package is installed."""
    folder = Path(__file__).resolve().parents[2] / "examples" / example.name
    if not (folder / "model.py").is_file():
        raise DemoError(f"{folder} is missing: run the demo from a checkout of the source, with `make demo`")
    return folder


def _export(supervisor: Supervisor, folders: Folders, example: Example) -> Path:
    """A fresh artifact from the example's model.py. Needs the `export` extra."""
    out = folders.root / "artifact"
    command = (
        *(program("model-export"), "build", "model:build"),
        *("--name", example.name, "--out", str(out)),
    )
    supervisor.run_all({"model-export": command}, at_once=1, timeout_s=300, folder=example_folder(example))
    return out


def _figures(
    options: Options,
    run: Run,
    memory: MemorySampler,
    broker: str,
    artifact: Artifact,
    split: Split,
    evaluator: Evaluator,
    folders: Folders,
    started: float,
) -> Figures:
    example, plan = options.example, options.example.plan
    samples = {device: len(part.y) for device, part in zip(DEVICES, split.devices, strict=True)}
    # The baselines' batches are what the accepted devices see together in one step. Batches of 8 on pooled digits
    # diverge in tens of passes with these rates; a baseline that does would prove nothing.
    baselines = train_baselines(
        artifact,
        plan,
        pooled=split.pooled,
        devices=split.devices,
        evaluator=evaluator,
        passes=sample_passes(run.rounds, samples, plan),
        batch_size=GOAL * plan.batch_size,
        seed=options.seed,
    )
    outputs = evaluator.outputs(folders.model / "model.onnx")
    score = evaluator.of_outputs(outputs)
    median, mean = round_seconds(run)
    telemetry = _telemetry(run.status)
    published = run.published
    return Figures(
        example=example.name,
        metric=example.metric.name,
        seed=options.seed,
        broker=broker,
        samples=samples,
        held_out=len(split.held_out.y),
        parameters=artifact.manifest.parameter_count,
        score=score,
        score_npz=evaluator.of_npz(folders.model / "model.npz"),
        error=example.metric.error(score, split.held_out.labels),
        recall=dict(
            zip(example.class_names, evaluator.recall(outputs, len(example.class_names)), strict=True)
        ),
        baselines=baselines,
        rounds=len(published),
        aborted=sum(round_.aborted for round_ in run.rounds),
        version=max((round_.version for round_ in published), default=0),
        late=len(run.late),
        refused=run.status["refused"],
        killed={kill.device: kill.round for kill in run.faults.kills},
        returned={restart.device: restart.round for restart in run.faults.restarts},
        updates=sum(len(round_.accepted) for round_ in published),
        round_median_s=median,
        round_mean_s=mean,
        bytes_up=Spread.of([float(values["bytes_up"]) for values in telemetry.values()]),
        bytes_down=Spread.of([float(values["bytes_down"]) for values in telemetry.values()]),
        update_bytes_per_parameter=(
            statistics.mean(run.update_bytes) / artifact.manifest.parameter_count
            if run.update_bytes
            else None
        ),
        memory=memory_figures(memory, BROKER),
        start_up_s=run.first_round_at - started,
        total_s=time.monotonic() - started,
        files=model_files(folders.model),
        violations=tuple(str(violation) for violation in run.status["invariant_violations"]),
    )


def _telemetry(status: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """What each device reported last, by name."""
    rows: list[Mapping[str, Any]] = status["devices"]
    return {row["device"]: row["telemetry"] for row in rows if row["telemetry"] is not None}
