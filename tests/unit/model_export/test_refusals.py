"""What cannot be exported is refused by name, with what can be done; nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody does
from torch import nn

from model_export.autodiff import rules
from model_export.build import build_artifact, import_build
from model_export.errors import ExportError, MissingRule, ParityError, UnsupportedModel
from model_export.manifest import check_destination, write_artifact

X, Y = torch.randn(3, 4), torch.arange(3)


def export(module: nn.Module, inputs: Any = (X,), target: Any = Y, loss: Any = "cross_entropy") -> Any:
    return build_artifact(lambda: (module, inputs, target, loss), name="model", seed=0)


class Head(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear(x))


def frozen() -> nn.Module:
    module = nn.Linear(4, 4)
    module.bias.requires_grad_(False)
    return module


class Unused(Head):
    def __init__(self) -> None:
        super().__init__(torch.tanh)
        self.forgotten = nn.Linear(2, 2)


def hooked() -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight.register_hook(lambda gradient: gradient / 2)
    return module


def hooked_backward() -> nn.Module:
    module = nn.Linear(4, 4)
    module.register_full_backward_hook(lambda module, gradients, outputs: None)
    return module


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.theta


class Counter(Head):
    def __init__(self) -> None:
        super().__init__(torch.tanh)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.detach().mean(0)  # type: ignore[operator,misc]
        return super().forward(x) + self.seen


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1)


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "float64": (nn.Linear(4, 4).double(), r"parameter weight is torch.float64; convert"),
    "cumulative average": (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)),
        r"BatchNorm1d at 1: momentum=None .* give it a momentum",
    ),
    "synchronised": (
        nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4)),
        r"SyncBatchNorm at 1: .* GroupNorm",
    ),
    "instance statistics": (nn.InstanceNorm1d(4, track_running_stats=True), r"InstanceNorm1d at the top"),
    "all in eval": (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(),
        r"the whole module is in eval\(\).*module.train\(\) in build\(\)",
    ),
    "counter": (Counter(), r"forward\(\) changes the buffers seen: only running statistics"),
    "alpha dropout": (
        nn.Sequential(nn.Linear(4, 4), nn.AlphaDropout(0.1)),
        r"AlphaDropout at 1: .* use Dropout",
    ),
    "functional alpha dropout": (
        Head(lambda x: F.alpha_dropout(x, 0.5, True)),
        "alpha_dropout .* is not covered",
    ),
    "attention dropout": (Attention(), r"MultiheadAttention at attention: dropout .* dropout=0"),
    "recurrent": (nn.LSTM(4, 4), r"LSTM at the top"),
    "frozen": (frozen(), r"parameter bias is frozen"),
    "no parameters": (nn.ReLU(), r"0 parameter tensors"),
    "taken name": (Named(), r"parameter theta: the graphs use this name"),
    "unused parameters": (Unused(), r"does not use the parameters forgotten.weight, forgotten.bias"),
    "padding index": (nn.Sequential(nn.Embedding(9, 4, padding_idx=0)), "Embedding at 0: padding_idx is not"),
    "max norm": (nn.Embedding(9, 4, max_norm=1.0), "Embedding at the top: max_norm .* normalise"),
    "scaled gradients": (nn.Embedding(9, 4, scale_grad_by_freq=True), "scale_grad_by_freq .* leave it out"),
    "gradient hook": (hooked(), "parameter weight has a gradient hook"),
    "backward hook": (hooked_backward(), "Linear at the top has a backward hook"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_model_is_refused_by_name(name: str) -> None:
    module, message = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=message):
        export(module)


def test_an_output_without_the_batch_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="every output must have the batch first"):
        export(Head(lambda x: x.sum(0)), loss=lambda output, target: output.mean())


def test_a_parameter_that_no_gradient_reaches_is_refused() -> None:
    with pytest.raises(
        UnsupportedModel, match=r"no gradient flows from the loss to linear.weight, linear.bias"
    ):
        export(Head(lambda x: (x > 0).float()), loss=lambda output, target: output.mean())


def test_an_operator_without_a_rule_is_named_with_its_module() -> None:
    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(1)

    with pytest.raises(
        MissingRule, match=r"Operator CumSum .* in 1 \(Block\) has no gradient rule. What can be done"
    ):
        export(nn.Sequential(nn.Linear(4, 4), Block()))


def test_an_operator_without_a_rule_is_fine_where_no_gradient_flows() -> None:
    export(Head(lambda x: x + x.detach().cumsum(1) * 0 + X[:1].cumsum(1)))


def test_a_wrong_rule_makes_no_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rules.RULES["Tanh"]
    monkeypatch.setitem(rules.RULES, "Tanh", lambda b, n, dy: [b.op("Mul", right(b, n, dy)[0], 1.001)])  # type: ignore[arg-type]
    with pytest.raises(ParityError, match=r"gradient linear.weight at batch 3"):
        export(Head(torch.tanh))


def test_a_loss_the_exporter_gets_wrong_makes_no_artifact() -> None:
    # torch's exporter leaves label smoothing out
    with pytest.raises(
        ParityError,
        match=r"loss at batch 3.* leaves out label smoothing \(write it out\) and torch.no_grad\(\)",
    ):
        export(
            Head(torch.tanh), loss=lambda output, target: F.cross_entropy(output, target, label_smoothing=0.2)
        )


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "loss name": ({"loss": "crossentropy"}, "unknown loss 'crossentropy'; one of"),
    "loss type": ({"loss": 3}, "must be one of .* or a callable, not int"),
    "loss not scalar": ({"loss": lambda o, t: F.cross_entropy(o, t, reduction="none")}, "one float32 number"),
    "loss fails": ({"loss": lambda o, t: o.nonsense}, "the loss does not run on the example: AttributeError"),
    "target dtype": ({"target": torch.zeros(3)}, "an int64 target of labels"),
    "target shape": ({"target": torch.zeros(3, 2), "loss": "mse"}, r"output's shape \(3, 4\), not \(3, 2\)"),
    "batch sizes": ({"target": torch.arange(4)}, "batches of one size"),
    "input shape": ({"inputs": (torch.randn(3, 5),)}, "does not run on the example inputs: RuntimeError"),
    "input dtype": ({"inputs": (X.double(),)}, "an example is torch.float64"),
    "negative label": (
        {"target": Y - 1},
        r"labels must be in 0\.\.3, .* from -1 to 1. For labels that do not count",
    ),
    "label too large": ({"target": Y + 2}, r"labels must be in 0\.\.3, .* from 2 to 4"),
    "not finite": ({"inputs": (X / 0,)}, "must be finite"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_build_is_explained(name: str) -> None:
    arguments, message = MISTAKES[name]
    with pytest.raises(ExportError, match=message):
        export(nn.Linear(4, 4), **arguments)


def test_an_operator_that_torch_cannot_write_is_named_with_its_module() -> None:
    with pytest.raises(
        ExportError, match=r"no ONNX form of the operator aten.adaptive_max_pool2d in 0 \(AdaptiveMaxPool2d\)"
    ):
        export(
            nn.Sequential(nn.AdaptiveMaxPool2d(3), nn.Flatten(), nn.Linear(9, 4)), (torch.randn(3, 1, 7, 7),)
        )


def test_a_branch_on_values_is_explained_and_torch_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ExportError, match=r"branches on the values of a tensor.*test_refusals.py:\d+\): .* torch.where"
    ):
        export(Head(lambda h: h * 2 if h.sum() > 0 else h))
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_an_error_in_build_is_shown_with_its_line() -> None:
    def build() -> object:
        raise ValueError("no data folder")

    with pytest.raises(
        ExportError, match=r"build\(\) fails: ValueError: no data folder \(.*test_refusals.py:\d+\)"
    ):
        build_artifact(build, name="model", seed=0)


def test_a_bad_name_is_refused_before_anything_runs() -> None:
    with pytest.raises(ExportError, match="the name 'my model' must be 1-200"):
        build_artifact(lambda: pytest.fail("build ran"), name="my model", seed=0)


def test_an_input_never_takes_the_name_of_a_parameter() -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input_0 = nn.Parameter(torch.randn(4))

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            return values[0] * self.input_0

    assert [spec.name for spec in export(Taken()).model.input_specs] == ["input__0"]


def test_build_must_return_four_things() -> None:
    with pytest.raises(ExportError, match=r"must return \(module, inputs, target, loss\)"):
        build_artifact(lambda: nn.Linear(1, 1), name="model", seed=0)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("model.py", "must look like my_module:build"),
        ("../model:build", "must look like"),
        ("no_such_module:build", "there is no no_such_module.py in"),
        ("faulty_model:build", "fails on import: ValueError: broken"),
        ("empty_model:build", r"empty_model has no function build\(\)"),
    ],
)
def test_a_source_that_cannot_be_imported_is_explained(reference: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "faulty_model.py").write_text("raise ValueError('broken')")
    (tmp_path / "empty_model.py").write_text("")
    with pytest.raises(ExportError, match=message):
        import_build(reference, tmp_path)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match=r"holds other things than an artifact \(thesis.txt\)"):
        check_destination(tmp_path)
    with pytest.raises(ExportError, match="exists and is no folder"):
        check_destination(tmp_path / "thesis.txt")


def test_an_artifact_replaces_an_older_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    first, second = (export(nn.Linear(4, 4)).artifact for _ in range(2))
    for artifact in (first, second):
        write_artifact(artifact, tmp_path / "artifact")
    assert (tmp_path / "artifact" / "params.bin").read_bytes() == second.files["params.bin"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]
