"""A sculptor goes to disk and comes back: the same bits, and no decomposition."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from sculpt import SculptConfig, Sculptor
from tests.sculpt.small_models import KINDS
from tests.sculpt.test_engines import EXACT, fit, model_of


def begun(model, config):
    sculptor = Sculptor(model, config)
    sculptor.begin_task(name="first")
    optimizer = torch.optim.AdamW(sculptor.param_groups(1e-3))
    sculptor.attach(optimizer)
    return sculptor, optimizer


@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_task_gives_the_same_bits(tmp_path, monkeypatch, engine, dtype):
    config = SculptConfig(target_modules=["2", "4", "5"], others="train", **EXACT[engine])
    whole = model_of(dtype)
    whole[0].bias.requires_grad_(False)
    sculptor, optimizer = begun(whole, config)
    fit(whole, optimizer, 3)
    saved = {name: value.clone() for name, value in whole.state_dict().items()}
    moments = copy.deepcopy(optimizer.state_dict())
    sculptor.save(tmp_path / "a")
    fit(whole, optimizer, 2)
    sculptor.save(tmp_path / "b", previous=tmp_path / "a")
    fit(whole, optimizer, 2)
    report = sculptor.verify()
    sculptor.end_task()

    monkeypatch.setattr("sculpt.subspaces.split", None)
    again = model_of(dtype)
    again.load_state_dict(saved)
    resumed = Sculptor.load(again, tmp_path / "a")
    for name, value in again.state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert [name for name, _ in resumed.named_parameters()] == [
        "2", "4", "5", "0.weight", "2.bias", "4.bias", "5.bias"
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(resumed.param_groups(1e-3))
    optimizer.load_state_dict(moments)
    resumed.attach(optimizer)
    fit(again, optimizer, 4)
    assert resumed.verify() == report
    resumed.end_task()
    for (name, a), b in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.requires_grad == (name != "0.bias")
    linked = tmp_path / "b" / "task.safetensors"
    assert linked.stat().st_ino == (tmp_path / "a" / "task.safetensors").stat().st_ino


@pytest.mark.parametrize("name", ["conv1d, fused qkv", "mixtral experts"])
def test_other_layers_come_back_too(tmp_path, name):
    model = KINDS[name].build()
    sculptor, optimizer = begun(model, SculptConfig())
    KINDS[name].loss(model).backward()
    optimizer.step()
    sculptor.save(tmp_path)
    after = {key: value.clone() for key, value in model.state_dict().items()}
    fresh = KINDS[name].build()
    Sculptor.load(fresh, tmp_path)
    assert all(torch.equal(value, after[key]) for key, value in fresh.state_dict().items())


def test_damaged_and_foreign_saves_are_refused(tmp_path):
    model = model_of(torch.bfloat16)
    sculptor, optimizer = begun(model, SculptConfig())
    fit(model, optimizer, 1)
    sculptor.save(tmp_path)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    about = tmp_path / "sculptor.json"
    text = about.read_text()

    def load(changed=None):
        fresh = model_of(torch.bfloat16)
        fresh.load_state_dict(weights if changed is None else changed)
        return Sculptor.load(fresh, tmp_path)

    load()
    with pytest.raises(ValueError, match=r"weight of '0' is not the one of the moment of saving"):
        load({name: value + 1 for name, value in weights.items()})
    with pytest.raises(ValueError, match=r"model does not fit: .*no '2'"):
        Sculptor.load(torch.nn.Sequential(model_of()[0]), tmp_path)
    about.write_text(json.dumps(json.loads(text) | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99; this version reads format 1"):
        load()
    about.write_text("{")
    with pytest.raises(ValueError, match="is not a sculptor's description"):
        load()
    about.write_text(text)
    moving = tmp_path / "coordinates.safetensors"
    data = bytearray(moving.read_bytes())
    data[-1] ^= 1
    moving.write_bytes(data)
    with pytest.raises(ValueError, match=r"coordinates.safetensors was changed"):
        load()
    moving.unlink()
    with pytest.raises(ValueError, match=r"incomplete: coordinates\.safetensors is missing"):
        load()
    about.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no sculptor.json"):
        load()
