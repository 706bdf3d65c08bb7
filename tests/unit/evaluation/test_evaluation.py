"""Held-out evaluation: the figures are right, and whatever goes wrong with them stops nothing else."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from aggregator.config import AggregatorConfig, load_aggregator_config
from aggregator.evaluation import EvaluationError, EvaluationFailed, Evaluator, auc, figures, finite
from aggregator.ledger.values import Evaluated
from aggregator.service import Service
from aggregator.setup import initialise
from edge_runtime.backends.artifact_folder import read_artifact_folder
from edge_runtime.backends.ort import OrtBackend
from edge_runtime.data import Dataset
from edge_runtime.protocol.ids import Digest
from edge_runtime.protocol.tensors import Vector
from tests.support.brokers import ROOT
from tests.support.engines import FEDERATION, Said, make_versions, parameters, service
from tests.support.programs import eventually

ARTIFACT = ROOT / "examples" / "digits" / "artifact"
SAMPLES = 600  # more than two batches


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    digits = load_digits()
    x = (digits.images[:SAMPLES, np.newaxis] / 16).astype(np.float32)
    np.savez(tmp_path / "held_out.npz", images=x, labels=digits.target[:SAMPLES].astype(np.int64))
    return tmp_path / "held_out.npz"


@pytest.fixture
def config(tmp_path: Path, held_out: Path) -> AggregatorConfig:
    settings = [f"evaluation.data={held_out}", 'evaluation.inputs=["images"]', "evaluation.target=labels"]
    return load_aggregator_config(
        initialise(tmp_path / "agg", FEDERATION, ARTIFACT, "mqtt://127.0.0.1:1", settings)
    )


def until(running: Service, condition: Callable[[], bool]) -> None:
    def turned() -> bool:
        running.engine.tick()
        return condition()

    eventually(turned, "the evaluation is committed")


# ---- figures ----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from((-1.5, 0.0, 0.5, 2.0)), st.booleans()), min_size=2, max_size=40))
def test_auc_is_the_share_of_pairs_in_order_with_ties_counting_half(rows: list[tuple[float, bool]]) -> None:
    scores, positive = np.array([score for score, _ in rows]), np.array([label for _, label in rows])
    if positive.all() or not positive.any():
        return
    above = scores[positive][:, np.newaxis] - scores[~positive]
    assert auc(scores, positive) == pytest.approx(np.mean((above > 0) + 0.5 * (above == 0)))
    assert auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))


def data(target: list[float]) -> Dataset:
    return Dataset(inputs=(), target=np.array(target, np.float32))


def test_each_loss_has_the_figures_that_people_ask_for() -> None:
    logits = np.array([[2.0], [-1.0], [3.0], [0.5]], np.float32)
    assert figures("bce_with_logits", logits, data([1, 0, 0, 1])) == {"accuracy": 0.75, "auc": 0.5}
    assert figures("bce_with_logits", logits, data([1, 1, 1, 1])) == {"accuracy": 0.75}
    assert figures("mse", logits[:2], data([1.0, 2.0])) == {"rmse": pytest.approx(5**0.5), "mae": 2.0}
    labels = Dataset(inputs=(), target=np.array([1, 0, 0]))
    scores = np.array([[0.0, 1.0], [0.0, 1.0], [np.nan, 0.0]], np.float32)
    assert figures("cross_entropy", scores, labels) == {"accuracy": pytest.approx(1 / 3)}
    assert figures("custom", logits, data([1, 0, 0, 1])) == {}


def test_a_diverged_model_has_no_figures_that_are_no_numbers() -> None:
    logits = np.array([np.nan, 1.0], np.float32)
    assert finite(figures("bce_with_logits", logits, data([0, 1]))) == {"accuracy": 0.5, "auc": None}
    assert finite({"rmse": float("inf"), "loss": float("nan")}) == {"rmse": None, "loss": None}


# ---- the thread and the engine ----------------------------------------------------------------------


def test_a_start_evaluates_the_versions_on_disk_that_were_not_and_the_next_does_not_repeat_it(
    config: AggregatorConfig, held_out: Path
) -> None:
    with service(config) as running:
        make_versions(running, 2)
    said = Said()
    with service(config, said) as running:
        ledger = running.engine.ledger
        running.engine.start()
        assert running.engine.evaluating
        until(running, lambda: not running.engine.evaluating)
        assert [row.version for row in ledger.evaluations()] == [0, 1, 2]
        row = ledger.evaluation(0)
        assert row is not None
        arrays = np.load(held_out)
        session = OrtBackend().load(read_artifact_folder(ARTIFACT))
        expected = session.evaluate(parameters(running, 0), [arrays["images"]], arrays["labels"])
        right = np.argmax(expected.outputs[0], axis=1) == arrays["labels"]
        assert row.samples == SAMPLES
        assert row.metrics == {"loss": pytest.approx(expected.loss, rel=1e-5), "accuracy": np.mean(right)}
        assert [fields["version"] for fields in said.of("evaluated")] == [0, 2, 1]
    with service(config) as running:
        running.engine.start()
        assert not running.engine.evaluating


def test_a_version_that_cannot_be_evaluated_is_reported_and_nothing_else_happens(
    config: AggregatorConfig,
) -> None:
    with service(config) as running:
        make_versions(running, 1)
    said = Said()
    with service(config, said) as running:
        running.engine.start()
        evaluator = running.engine.evaluator
        assert evaluator is not None
        evaluator.submit(7, running.engine.versions.initial_digest())  # gone from disk, as a pruned one is
        until(running, lambda: not evaluator.busy)
        assert any(fields["version"] == 7 for fields in said.of("evaluation_failed"))
        assert running.engine.ledger.evaluation(7) is None


def test_an_end_while_a_version_is_evaluated_gives_it_up_and_all_that_wait(config: AggregatorConfig) -> None:
    artifact = read_artifact_folder(ARTIFACT)
    reading, ending = threading.Event(), threading.Event()

    def read(version: int, digest: Digest) -> Vector:
        reading.set()
        ending.wait()
        return np.zeros(artifact.manifest.parameter_count, np.float32)

    evaluator = Evaluator(config.evaluation, artifact, read)
    for version in (1, 2, 3):
        evaluator.submit(version, artifact.manifest.files["params.bin"].sha256)
    reading.wait()
    closing = threading.Thread(target=evaluator.close)
    closing.start()
    eventually(evaluator._closing.is_set, "the end is asked for")
    ending.set()
    closing.join()
    assert evaluator.results() == []


def test_a_model_that_diverged_is_committed_without_its_loss(config: AggregatorConfig) -> None:
    artifact = read_artifact_folder(ARTIFACT)
    nan = np.full(artifact.manifest.parameter_count, np.nan, np.float32)
    evaluator = Evaluator(config.evaluation, artifact, lambda version, digest: nan)
    evaluator.submit(1, artifact.manifest.files["params.bin"].sha256)
    found: list[Evaluated | EvaluationFailed] = []

    def done() -> bool:
        found.extend(evaluator.results())
        return bool(found)

    eventually(done, "the evaluation is done")
    evaluator.close()
    (result,) = found
    assert isinstance(result, Evaluated)
    assert result.metrics["loss"] is None


def test_only_every_so_many_versions_are_wanted(config: AggregatorConfig) -> None:
    every = dataclasses.replace(config.evaluation, every=5)
    evaluator = Evaluator(
        every, read_artifact_folder(ARTIFACT), lambda version, digest: np.zeros(1, np.float32)
    )
    evaluator.close()
    assert [version for version in range(12) if evaluator.wants(version)] == [0, 5, 10]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"target": "answers"}, "no array 'answers'; it holds images, labels"),
        ({"inputs": ("images", "images")}, "the model takes 1 input"),
        ({"inputs": ("labels",), "target": "labels"}, "has shape"),
        ({"data": Path("nowhere.npz")}, "nowhere.npz: cannot be read"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_serving(
    config: AggregatorConfig, change: dict[str, Any], complaint: str
) -> None:
    wrong = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **change))
    with pytest.raises(EvaluationError, match=complaint), service(wrong):
        pass
