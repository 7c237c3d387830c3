"""Adapters and checkpoints of other implementations become plain dense models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_language import tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sculpt import importers
from sculpt.cli.app import app
from sculpt.importers import ImportFailed, import_model

TARGETS = ("q_proj", "down_proj", "up_proj")
TRAINED = 5  # directions


def is_target(name: str) -> bool:
    return name.removesuffix(".weight").endswith(TARGETS)


def low(W: torch.Tensor) -> tuple[torch.Tensor, ...]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return tuple(x.contiguous() for x in (U[:, -TRAINED:], S[-TRAINED:], Vh[-TRAINED:]))


def moved(factors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(factor + 0.01 * torch.randn_like(factor) for factor in factors)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter in the format of peft 0.21.2, and the dense weights it stands for."""
    torch.manual_seed(1)
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors, dense = {}, load_file(base / "model.safetensors")
    for name, W in list(dense.items()):
        if is_target(name):
            before = low(W)
            U, S, V = moved(before)
            stem = f"base_model.model.{name.removesuffix('.weight')}.osf_svd_params"
            tensors |= {f"{stem}.U_low": U, f"{stem}.S_low": S, f"{stem}.V_low": V}
            change = (U.double() * S) @ V.double() - (before[0].double() * before[1]) @ before[
                2
            ].double()
            dense[name] = (W.double() + change).float()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "OSF", "effective_rank": 0.8, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, dense


@pytest.fixture
def factored(tmp_path: Path, base: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A mini_trainer checkpoint that kept its factors, and the dense weights it stands for."""
    torch.manual_seed(1)
    folder = tmp_path / "factored"
    folder.mkdir()
    tensors, dense = {}, load_file(base / "model.safetensors")
    for name, W in list(dense.items()):
        if not is_target(name):
            tensors[name] = W
            continue
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        stem = name.removesuffix(".weight")
        high = (x.contiguous() for x in (U[:, :-TRAINED], S[:-TRAINED], Vh[:-TRAINED]))
        high = tuple(high)
        after = moved(low(W))
        tensors |= {f"{stem}.osft_{s}_high": f for s, f in zip("USV", high, strict=True)}
        tensors |= {f"{stem}.osft_params.{s}_low": f for s, f in zip("USV", after, strict=True)}
        parts = [(a.double() * b) @ c.double() for a, b, c in (high, after)]
        dense[name] = sum(parts).float()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((base / "config.json").read_text())
    return folder, dense


def check(out: Path, dense: dict[str, torch.Tensor]) -> None:
    tensors = {n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()}
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in dense.items()
    }
    for name, expected in dense.items():
        if is_target(name):
            torch.testing.assert_close(tensors[name], expected, rtol=0, atol=1e-6)
            # The change itself is much larger than that.
            assert not torch.allclose(expected, tiny_model().state_dict()[name], atol=1e-3)
        else:
            assert torch.equal(tensors[name], expected)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_peft_adapter(adapter, tmp_path, shard_bytes, monkeypatch):
    monkeypatch.setattr(importers, "SHARD_BYTES", shard_bytes)
    found = import_model(adapter[0], tmp_path / "out")
    assert (found.matrices, found.copied) == (6, 14)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file() == (shard_bytes < 10**9)
    check(tmp_path / "out", adapter[1])


def test_a_mini_trainer_checkpoint(factored, tmp_path):
    found = import_model(factored[0], tmp_path / "out")
    assert (found.matrices, found.copied) == (6, 14)
    check(tmp_path / "out", factored[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_made_by_peft_itself(dtype, tmp_path):
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "OSFConfig"):
        pytest.skip("this peft has no OSF")
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path / "base")
    config = peft.OSFConfig(
        effective_rank=0.75, target_modules="all-linear", rank_pattern={"q_proj": 8}
    )
    wrapped = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.save_pretrained(tmp_path / "adapter")
    import_model(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    merged = wrapped.merge_and_unload().state_dict()
    imported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert imported.keys() == merged.keys()
    # float32: what a decomposition in float32 leaves; bfloat16: one unit in the last place.
    size = max(float(torch.linalg.matrix_norm(w.float(), 2)) for w in merged.values() if w.ndim > 1)
    tolerance = {"rtol": 0, "atol": 8 * torch.finfo(torch.float32).eps * size}
    if dtype == torch.bfloat16:
        tolerance = {"rtol": 2**-7, "atol": 2**-9}
    for name, expected in merged.items():
        assert imported[name].dtype == dtype
        torch.testing.assert_close(imported[name], expected, **tolerance)


def rewrite(folder: Path, name: str, change) -> None:
    file = folder / name
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def first(tensors: dict, ending: str) -> str:
    return next(name for name in tensors if name.endswith(ending))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(first(t, "U_low")), "has no U_low"),
        (lambda t: t.update({first(t, "S_low"): torch.ones(3)}), "which do not fit"),
        (lambda t: t[first(t, "V_low")].fill_(torch.nan), "not finite"),
        (lambda t: t.update({"else.U_low": torch.ones(3, 3)}), "does not begin with"),
        (
            lambda t: t.update({"base_model.model.other.weight": torch.ones(3, 3)}),
            "is it the right one",
        ),
    ],
)
def test_a_damaged_adapter_is_refused(change, message, adapter, tmp_path):
    rewrite(adapter[0], "adapter_model.safetensors", change)
    with pytest.raises(ImportFailed, match=message):
        import_model(adapter[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(first(t, "S_high")), "has no S_high"),
        (lambda t: t.update({first(t, "V_high"): torch.ones(3, 3)}), "do not fit"),
        (lambda t: t[first(t, "U_high")].fill_(torch.inf), "not finite"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(3, 3)}),
            "and its factors",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(change, message, factored, tmp_path):
    rewrite(factored[0], "model.safetensors", change)
    with pytest.raises(ImportFailed, match=message):
        import_model(factored[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_imported_is_named(adapter, base, tmp_path):
    folder, _ = adapter
    out = tmp_path / "out"
    with pytest.raises(ImportFailed, match="a plain model already"):
        import_model(base, out)
    with pytest.raises(ImportFailed, match="is for adapters"):
        import_model(base, out, base=base)
    config = folder / "adapter_config.json"
    for content, message in (
        ('{"peft_type": "LORA"}', "is a LORA adapter"),
        ('{"peft_type": "OSF", "base_model_name_or_path": "nobody/nothing"}', "--base DIR"),
        ("{", "no adapter configuration"),
    ):
        config.write_text(content)
        with pytest.raises(ImportFailed, match=message):
            import_model(folder, out)
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(ImportFailed, match="is in use"):
        import_model(folder, out)


def test_the_command(adapter, tmp_path):
    folder, dense = adapter
    result = CliRunner().invoke(app, ["import", str(folder), str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "6 matrices put together, 14 other tensors copied" in result.output
    check(tmp_path / "out", dense)
    result = CliRunner().invoke(app, ["import", str(folder), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "is in use" in result.output
