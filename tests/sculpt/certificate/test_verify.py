"""Certificates from disk agree with those made during training, and refuse what is damaged."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_language import tiny_model
from typer.testing import CliRunner

from sculpt import SculptConfig, Sculptor
from sculpt.certificate.disk import verify_checkpoints
from sculpt.certificate.streamed import bytes_for
from sculpt.cli.app import app
from sculpt.storage.weights import StoredWeightsError

RATIO = 0.25


def train(model: torch.nn.Module, sculptor: Sculptor, steps: int = 8) -> None:
    sculptor.begin_task()
    optimizer = torch.optim.AdamW(sculptor.parameters(), lr=1e-3)
    sculptor.attach(optimizer)
    ids = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    """A model before and after a task, and the certificate made during training."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = tiny_model()
    model.save_pretrained(folder / "before")
    sculptor = Sculptor(model, SculptConfig(unfreeze_rank_ratio=RATIO))
    train(model, sculptor)
    certificate = sculptor.verify(independent=True)
    sculptor.end_task()
    model.save_pretrained(folder / "after", max_shard_size="20KB")
    return folder / "before", folder / "after", certificate.to_dict()


def load_all(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}


def only(folder: Path, name: str) -> Path:
    """Empties the folder but for one empty file."""
    for file in folder.iterdir():
        file.unlink()
    (folder / name).touch()
    return folder / name


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a checkpoint, which is one file afterwards."""
    tensors = load_all(folder)
    change(tensors)
    save_file(tensors, only(folder, "model.safetensors"))


def reindex(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Changes which file the index names for a tensor."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def verify(before: Path, after: Path, **fields):
    config = SculptConfig(**({"unfreeze_rank_ratio": RATIO} | fields))
    return verify_checkpoints(before, after, config)


def test_agrees_with_the_certificate_made_during_training(trained):
    before, after, during = trained
    assert (after / "model.safetensors.index.json").is_file(), "expected a sharded checkpoint"
    found = verify(before, after)
    assert found.ok
    rows = {row.name: row for row in found.certificate.rows if row.change > 0}
    assert set(rows) == {row["name"] for row in during["rows"]}
    for row in during["rows"]:
        mine = rows[row["name"]]
        for field in ("left", "right", "core"):
            assert getattr(mine, field) == pytest.approx(row[field], rel=1e-6, abs=1e-10)
        for field in ("floor", "change", "limit"):
            assert getattr(mine, field) == pytest.approx(row[field], rel=1e-9)
    # What is no target is compared bit by bit.
    assert found.compared == 5
    assert found.moved == []


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30), (2, 64), (3, 16, 24)])
@pytest.mark.parametrize("panel_bytes", [1, 2**30])
def test_leaks_are_those_of_the_definition(shape, panel_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr("sculpt.certificate.streamed.PANEL_BYTES", panel_bytes)
    g = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=g, dtype=torch.float64)
    D = 1e-2 * torch.randn(shape, generator=g, dtype=torch.float64)
    save_file({"a.weight": W}, tmp_path / "before.safetensors")
    save_file({"a.weight": W + D}, tmp_path / "after.safetensors")
    found = verify(tmp_path / "before.safetensors", tmp_path / "after.safetensors")
    assert found.broken
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    h = max(1, math.floor(0.75 * min(shape[-2:])))
    left = (U[..., :h].mT @ D).norm(dim=(-2, -1)) / D.norm(dim=(-2, -1))
    right = (D @ Vh[..., :h, :].mT).norm(dim=(-2, -1)) / D.norm(dim=(-2, -1))
    core = (U[..., :h].mT @ D @ Vh[..., :h, :].mT).norm(dim=(-2, -1)) / D.norm(dim=(-2, -1))
    rows = found.certificate.rows
    for field, expected in (("left", left), ("right", right), ("core", core)):
        got = [getattr(row, field) for row in rows]
        assert got == pytest.approx(expected.reshape(-1).tolist(), rel=1e-9)


def test_rank_deficient_matrices_protect_what_they_have(tmp_path):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(32, 3, generator=g) @ torch.randn(3, 48, generator=g)
    U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    D = torch.randn(32, 48, generator=g).double()
    D = D - U[:, :3] @ (U[:, :3].T @ D)
    D = D - (D @ Vh[:3].T) @ Vh[:3]
    save_file({"a.weight": W.double()}, tmp_path / "before.safetensors")
    save_file({"a.weight": W.double() + 1e-2 * D}, tmp_path / "after.safetensors")
    assert verify(tmp_path / "before.safetensors", tmp_path / "after.safetensors").ok


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_one_edited_number_is_seen(trained, tmp_path, name):
    before, after, _ = trained
    copy = shutil.copytree(after, tmp_path / "copy")
    edit(copy, lambda tensors: tensors[name].view(-1)[3].add_(1e-2))
    found = verify(before, copy)
    assert found.broken
    broken = [row.name for row in found.certificate.rows if not row.ok]
    assert [*found.moved, *broken] in ([name], [name.removesuffix(".weight")])
    assert "BROKEN" in str(found) or "none may" in str(found)


def test_named_targets_and_what_trains_beside_them(trained):
    before, after, _ = trained
    moved = verify(before, after, target_modules=["q_proj"])
    assert moved.broken
    assert len(moved.moved) == 12
    assert "12 of " in str(moved)
    free = verify(before, after, target_modules=["q_proj"], others="train")
    assert free.ok
    assert len(free.free) == 12
    with pytest.raises(ValueError, match="name the targets"):
        verify(before, after, others="train")


def test_the_core_constraint_is_judged_by_its_own_leak(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "before")
    config = SculptConfig(unfreeze_rank_ratio=RATIO, constraint="core")
    sculptor = Sculptor(model, config)
    train(model, sculptor)
    certificate = sculptor.verify(independent=True)
    model.save_pretrained(tmp_path / "after")  # the end of the task rounds once more
    found = verify(tmp_path / "before", tmp_path / "after", constraint="core")
    assert found.ok
    mine = {row.name: row for row in found.certificate.rows}
    for row in certificate.rows:
        assert mine[row.name].leak == pytest.approx(row.leak, rel=1e-6, abs=1e-10)
    assert verify(tmp_path / "before", tmp_path / "after").broken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_two_tasks_later_is_broken_with_a_hint(dtype, tmp_path):
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path / "0")
    sculptor = Sculptor(model, SculptConfig(unfreeze_rank_ratio=RATIO))
    for task in (1, 2):
        train(model, sculptor)
        sculptor.end_task()
        model.save_pretrained(tmp_path / str(task))
    for first, last in ((0, 1), (1, 2)):
        assert not verify(tmp_path / str(first), tmp_path / str(last)).broken
    both = verify(tmp_path / "0", tmp_path / "2")
    assert both.broken
    assert "with more than one in between, compare the checkpoint after each" in str(both)


def test_the_same_checkpoint_twice(trained):
    before, _, _ = trained
    assert "Nothing changed" in str(verify(before, before))


UP = "model.layers.0.mlp.up_proj.weight"
DAMAGES = {
    "missing layer": (lambda f: edit(f, lambda t: t.pop(UP)), f"lacks {UP}"),
    "foreign": (lambda f: edit(f, lambda t: (t.clear(), t.update(a=torch.ones(1)))), "0 tensors"),
    "other shape": (lambda f: edit(f, lambda t: t.update({UP: t[UP][:4].clone()})), "has shape"),
    "not finite": (lambda f: edit(f, lambda t: t[UP].fill_(math.nan)), "not finite, after"),
    "nothing there": (shutil.rmtree, "does not exist"),
    "empty": (lambda f: only(f, "x"), r"has no model\.safetensors"),
    "pickle": (lambda f: only(f, "pytorch_model.bin"), "a pickle"),
    "adapter": (lambda f: only(f, "adapter_model.safetensors"), "merge_and_unload"),
    "truncated": (
        lambda f: os.truncate(first_shard(f), first_shard(f).stat().st_size - 7),
        "truncated, damaged or no safetensors",
    ),
    "missing shard": (lambda f: first_shard(f).unlink(), "1 of 4 files are missing"),
    "index names another": (
        lambda f: reindex(f, lambda w: w.update(extra=first_shard(f).name)),
        "names extra in",
    ),
    "index forgets one": (
        lambda f: reindex(f, lambda w: w.pop("model.norm.weight")),
        r"has model\.norm\.weight, which",
    ),
    "index leads away": (
        lambda f: reindex(f, lambda w: w.update(a="../b")),
        "without a directory",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoints_are_refused_by_name(kind, trained, tmp_path):
    before, after, _ = trained
    path = shutil.copytree(after, tmp_path / "copy")
    damage, message = DAMAGES[kind]
    damage(path)
    with pytest.raises((StoredWeightsError, ValueError), match=message):
        verify(before, path)
    result = CliRunner().invoke(app, ["verify", str(before), str(path), "--ratio", "0.25"])
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert "Traceback" not in result.output


def test_the_command(trained, tmp_path):
    before, after, _ = trained
    contents = {"run": {"config": {"sculpt": {"effective_rank": 0.75}}}, "demo": {"ratio": 0.25}}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    of_run, of_demo = (["--run", str(tmp_path / name)] for name in contents)
    for code, said, *options in (
        (0, "The constraint holds", "--ratio", "0.25"),
        (0, '"ok": true', "--effective-rank", "0.75", "--json"),
        (2, "preserves all 16 directions", "--effective-rank", "31"),
        (1, "BROKEN", "--effective-rank", "15"),
        (0, "The constraint holds", *of_run),
        (0, "The constraint holds", *of_demo),
        (1, "BROKEN", *of_run, "--rank-pattern", "down_proj=31"),
        (1, "none may", *of_run, "--target-modules", "q_proj,k_proj"),
        (1, "none may", *of_run, "--exclude-modules", "q_proj"),
        (2, "did you mean 'q_proj'", *of_run, "--exclude-modules", "qproj"),
        (2, "exactly one of --ratio, --effective-rank, --run"),
        (2, "got --ratio and --effective-rank", "--ratio", "0.2", "--effective-rank", "3"),
        (2, "preserves nothing", "--ratio", "1.0"),
        (2, "--effective-rank most: expected an int", "--effective-rank", "most"),
        (2, "cannot be read", "--run", "nowhere"),
        (2, "expected REGEX=RANK", "--ratio", "0.2", "--rank-pattern", "q_proj"),
        (2, "constraint must be one of", "--ratio", "0.2", "--constraint", "strickt"),
    ):
        result = CliRunner().invoke(app, ["verify", str(before), str(after), *options])
        assert result.exit_code == code, result.output
        assert said in result.output


def test_a_matrix_too_wide_for_this_machine_is_named_beforehand(trained, monkeypatch):
    before, after, _ = trained
    needed = bytes_for(32)  # short side of the widest
    monkeypatch.setattr("sculpt.certificate.disk.available_memory_bytes", lambda: needed)
    assert verify(before, after).ok
    monkeypatch.setattr("sculpt.certificate.disk.available_memory_bytes", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"weight is \d+ x 32: to decompose it .* GB of memory"):
        verify(before, after)
