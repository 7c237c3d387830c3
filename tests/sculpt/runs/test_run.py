"""The task sequence: same data for both methods, same matrices, plain model before and after."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_language import VERY, tiny_model
from tiny_runs import run_config, write_lines

from bench.baselines import BASELINES
from sculpt.curvature.memory import Memory
from sculpt.models.causal import CausalLearner
from sculpt.models.encoding import Encoded
from sculpt.report.page import report
from sculpt.runs.config import TrainingConfig
from sculpt.runs.directory import RunDirectory, RunError, locked
from sculpt.runs.loop import TrainingError
from sculpt.runs.methods import METHODS
from sculpt.runs.prepare import Prepared
from sculpt.runs.start import run
from sculpt.runs.state import MethodResult, Progress

CPU = torch.device("cpu")
TRAINED = {
    f"model.layers.{layer}.{part}_proj.weight"
    for layer in range(2)
    for part in (*(f"self_attn.{x}" for x in "qkvo"), *(f"mlp.{x}" for x in ("gate", "up", "down")))
}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], ...]]:
    """Tokens of every batch."""
    batches: list[tuple[tuple[int, ...], ...]] = []
    loss = CausalLearner.loss

    def recorded(self: CausalLearner, rows: Sequence[Encoded]) -> tuple[torch.Tensor, int]:
        batches.append(tuple(row.ids for row in rows))
        return loss(self, rows)

    monkeypatch.setattr(CausalLearner, "loss", recorded)
    return batches


def test_methods_see_the_same_rows_and_train_the_same_matrices(
    tmp_path: Path, seen: list[tuple[tuple[int, ...], ...]]
) -> None:
    before, batches = None, {}
    for method, path in (METHODS | BASELINES).items():
        more = {"options": {"share": 0.5}} if method == "replay" else {}
        more["sculpt"] = {"subspaces": "weights"}  # Rows that are only protected are no batches.
        config = run_config(tmp_path, method=path, out=str(tmp_path / method), seed=5, **more)
        results = run(config)
        steps = 0 if method == "frozen" else 3
        assert [len(row) for row in results.methods[path].losses] == [steps, steps]
        before = load_file(config.model / "model.safetensors")
        after = load_file(config.out / "model" / "model.safetensors")
        assert {k: (v.shape, v.dtype) for k, v in after.items()} == {
            k: (v.shape, v.dtype) for k, v in before.items()
        }
        changed = {k for k in before if not torch.equal(before[k], after[k])}
        assert changed == (set() if method == "frozen" else TRAINED)
        batches[method] = seen.copy()
        seen.clear()
    for method in ("sculpt", "lora", "osf", "olora", "l2sp"):
        assert batches[method] == batches["plain"]
    assert len(batches["plain"]) == 6


def test_the_order_of_rows_depends_on_the_seed(
    tmp_path: Path, seen: list[tuple[tuple[int, ...], ...]]
) -> None:
    orders = []
    for number, seed in enumerate((0, 0, 1)):
        out = str(tmp_path / f"run-{number}")
        run(run_config(tmp_path, method="plain", out=out, seed=seed))
        orders.append(seen.copy())
        seen.clear()
    assert orders[0] == orders[1] != orders[2]


def test_a_run_leaves_matrix_certificates_and_model(tmp_path: Path) -> None:
    events: list[Progress] = []
    config = run_config(tmp_path, checkpoint={"every_steps": 1, "models": "each"})
    result = run(config, events.append).methods["sculpt"]
    for values in (result.generated, result.among_labels):
        assert [[math.isnan(value) for value in row] for row in values] == [
            [False, True],
            [False, False],
        ]
    assert len(result.certificates) == 2
    assert all(certificate.ok for certificate in result.certificates)
    assert result.worst_leak is not None
    assert result.worst_leak.leak <= result.worst_leak.limit
    assert [[row["preserved"] for row in rows] for rows in result.subspaces] == [
        [24, 12, 12, 24, 24, 24, 24] * 2
    ] * 2
    assert result.subspaces[0][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert 0.5 < result.subspaces[1][0]["energy"] < 1
    # Two moments and a step count for each matrix of the 14: t = 8 of 32, 4 of 16 for keys, values.
    assert result.trainable_elements == 2 * (5 * 8**2 + 2 * 4**2)
    assert result.optimizer_state_bytes == 4 * (2 * result.trainable_elements + 14)
    assert {e.phase for e in events} == {"subspaces", "train", "certify", "evaluate"}
    assert result.step_seconds > 0
    assert set(result.seconds) == {"subspaces", "train", "certify", "evaluate", "save"}

    out = config.out
    names = {path.name for path in out.iterdir() if path.name != ".lock"}
    assert names == {"config.json", "model", "models", "results.json", "status.json"}
    assert sorted(path.name for path in (out / "models").iterdir()) == ["01-very", "02-short"]
    saved = [load_file(out / name / "model.safetensors") for name in ("model", "models/02-short")]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    learner = CausalLearner.from_directory(out / "model")
    assert learner.score(VERY).among_labels == result.among_labels[1][0]
    written = json.loads((out / "results.json").read_text())["methods"]["sculpt"]
    again = MethodResult.from_dict(written)
    assert again.certificates == result.certificates
    assert again.losses == result.losses
    assert repr(again.generated) == repr(result.generated)
    assert RunDirectory(out).status() == "finished"


def test_plain_holds_no_more_than_weights_and_moments(tmp_path: Path) -> None:
    result = run(run_config(tmp_path, method="plain")).methods["plain"]
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    assert result.trainable_elements == weights
    assert result.optimizer_state_bytes == 4 * (2 * weights + 14)
    assert result.certificates == []


def test_accumulated_and_bucketed_and_packed_steps_are_the_same_steps(tmp_path: Path) -> None:
    losses = []
    for number, changes in enumerate(({}, {"accumulate": 2}, {"packing": True})):
        training = {"steps": 3, "batch_size": 4, "lr": 1e-3, **changes}
        out = str(tmp_path / f"run-{number}")
        result = run(run_config(tmp_path, method="plain", out=out, training=training))
        losses.append(result.methods["plain"].losses)
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]))
    torch.testing.assert_close(torch.tensor(losses[2]), torch.tensor(losses[0]))


def test_gradients_are_clipped_to_their_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *arguments: object) -> object:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in parameters])))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    run(run_config(tmp_path, training={"steps": 2, "lr": 1e-3, "max_grad_norm": 1e-3}))
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path, method="plain", training={"steps": 3, "lr": 1e-3})
    monkeypatch.setattr(
        CausalLearner,
        "loss",
        lambda self, rows: (self.model.lm_head.weight.sum() * 0 + math.nan, 1),
    )
    monkeypatch.setattr(torch.autograd, "backward", lambda loss: None)
    with pytest.raises(TrainingError, match=r"step 1 of 'very'.*lr below 0\.001"):
        run(config)
    assert RunDirectory(config.out).status() == "failed"


def test_two_runs_never_share_a_directory(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    with locked(config.out), pytest.raises(RunError, match="in use by another run"):
        run(config)
    run(config)
    with pytest.raises(RunError, match="is not empty"):
        run(config)


def test_rates_rise_and_fall() -> None:
    training = TrainingConfig(steps=5, warmup_steps=3)
    assert [training.factor(step, 5) for step in range(1, 6)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = TrainingConfig(steps=6, warmup_steps=2, schedule="linear")
    expected = [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25]
    assert [linear.factor(step, 6) for step in range(1, 7)] == pytest.approx(expected)
    cosine = TrainingConfig(steps=4, schedule="cosine")
    expected = [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert [cosine.factor(step, 4) for step in range(1, 5)] == pytest.approx(expected)


def test_epochs_count_rows() -> None:
    assert TrainingConfig(epochs=1.5, batch_size=8).steps_for(600) == 113
    assert TrainingConfig(batch_size=8).steps_for(9) == 2
    assert TrainingConfig(steps=4).steps_for(9) == 4


def test_long_documents_are_learned_whole(
    tmp_path: Path, seen: list[tuple[tuple[int, ...], ...]]
) -> None:
    text = "the film is good and the song is very bad they say that it is long"
    files = [write_lines(tmp_path / f"{n}.jsonl", [{"document": text}]) for n in ("a", "b")]
    tasks = [{"name": "documents", "train": str(files[0]), "test": str(files[1])}]
    training = {"epochs": 1, "batch_size": 1, "lr": 1e-3, "max_tokens": 4}
    result = run(run_config(tmp_path, data={"tasks": tasks}, training=training))
    # 15 words and the end: four pieces, each once.
    assert sorted(len(ids) for batch in seen for ids in batch) == [4, 4, 4, 4]
    score = result.methods["sculpt"]
    assert 0 <= score.generated[0][0] <= 1
    assert score.more["next_token"] == score.generated


@pytest.mark.parametrize("importance", ["cosine", "fisher"])
def test_ranks_adapt_to_rows_of_the_task_before(
    tmp_path: Path, seen: list[tuple[tuple[int, ...], ...]], importance: str
) -> None:
    ranks = {"mrr": 0.2, "trr": 0.6, "importance": importance}
    sculpt = {"ranks": ranks, "subspaces": "weights"}
    config = run_config(tmp_path, sculpt=sculpt, calibration_rows=2)
    results = run(config)
    prepared = Prepared(config)
    first = {row.ids for row in prepared.rows[0]}
    calibrations = [batches[0] for batches in seen if len(batches) == 1]
    assert len(calibrations) == 4  # two rows for each of two tasks, one by one
    assert set(calibrations) <= first
    for rows in results.methods["sculpt"].subspaces:
        assert len({row["preserved"] / min(row["shape"]) for row in rows}) > 3
        assert sum(row["importance"] for row in rows) / len(rows) == pytest.approx(1)
    assert RunDirectory(config.out).described()[0].sculpt == config.sculpt
    names = [row["name"] for row in results.methods["sculpt"].subspaces[1]]
    for file in ("01-very", "02-short"):
        table = (config.out / "ranks" / f"{file}.txt").read_text()
        assert "importance" in table
        assert all(name in table for name in names)
    page = report([config.out])
    assert "importance by" in page
    assert escape(table.strip()) in page


def test_uniform_ranks_leave_no_files_of_layers(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    run(config)
    assert not (config.out / "ranks").exists()
    assert "What each layer got" not in report([config.out])


def test_a_later_run_protects_what_an_earlier_one_learned(tmp_path: Path) -> None:
    first = run_config(tmp_path, checkpoint={"memory": True, "models": "each"}, calibration_rows=2)
    earlier = run(first).methods["sculpt"]
    assert {row["method"] for row in earlier.subspaces[0]}.isdisjoint({"curvature, ratio"})
    saved = first.out / "model"
    weights = run_config(tmp_path, sculpt={"subspaces": "weights"}, out=str(tmp_path / "weights"))
    without = run(weights).methods["sculpt"].held_bytes
    one, both = (Memory.load(f, tiny_model(), CPU) for f in (first.out / "models/01-very", saved))
    assert (one.rows, both.rows) == ({"very": 2}, {"very": 2, "short": 2})
    sums = sum(t.nbytes for f in both.factors.values() for t in f.tensors().values())
    assert earlier.held_bytes == without + sums
    later = run_config(tmp_path, model=str(saved), memory=str(saved), out=str(tmp_path / "later"))
    result = run(later).methods["sculpt"]
    assert {row["method"] for row in result.subspaces[0]} == {"curvature, ratio"}
    assert all(0 < row.outputs < 1 for row in result.certificates[0].rows)
    assert not (later.out / "model" / "sculpt_memory.safetensors").exists()
    pages = [report([config.out]) for config in (first, later)]
    assert [page.count("output gradients, d = ") for page in pages] == [7, 0]  # kinds of matrices
    most = max(row.outputs for row in result.certificates[0].rows)
    assert f"the most of all tasks; a full colour is {most:.2g}." in pages[1]
    assert "Ranks and spectra" not in pages[0]
