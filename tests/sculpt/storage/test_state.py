"""A sculptor goes to disk and comes back: the same bits, and no decomposition."""

from __future__ import annotations

import copy
import json
import threading

import pytest
import torch

from sculpt import SculptConfig, Sculptor
from sculpt.storage import task as state
from tests.sculpt.small_models import ENGINES, KINDS
from tests.sculpt.task.test_engines import fit, inputs, model_of


def started(model, config):
    sculptor = Sculptor(model, config)
    sculptor.begin_task(name="first")
    optimizer = torch.optim.AdamW(sculptor.parameters(), lr=1e-3)
    sculptor.attach(optimizer)
    return sculptor, optimizer


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_task_gives_the_same_bits(tmp_path, monkeypatch, engine, dtype):
    config = SculptConfig(target_modules=["2", "4", "5"], others="train", **ENGINES[engine])
    whole = model_of(dtype)
    whole[0].bias.requires_grad_(False)
    sculptor, optimizer = started(whole, config)
    fit(whole, optimizer, 3)
    saved = {name: value.clone() for name, value in whole.state_dict().items()}
    moments = copy.deepcopy(optimizer.state_dict())
    sculptor.save(tmp_path / "a")
    fit(whole, optimizer, 2)
    sculptor.save(tmp_path / "b", previous=tmp_path / "a")
    fit(whole, optimizer, 2)
    report = sculptor.verify()
    sculptor.end_task()

    monkeypatch.setattr("sculpt.task.bases.split", None)
    again = model_of(dtype)
    again.load_state_dict(saved)
    resumed = Sculptor.load(again, tmp_path / "a")
    for name, value in again.state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert [name for name, _ in resumed.named_parameters()] == [
        "2", "4", "5", "0.weight", "2.bias", "4.bias", "5.bias"
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    optimizer.load_state_dict(moments)
    resumed.attach(optimizer)
    fit(again, optimizer, 4)
    assert resumed.verify() == report
    resumed.end_task()
    for (name, a), b in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.requires_grad == (name != "0.bias")
    one, two = (next((tmp_path / name).glob("task-*.safetensors")) for name in "ab")
    assert one.samefile(two)


@pytest.mark.parametrize("name", ["conv1d, fused qkv", "mixtral experts"])
def test_other_layers_come_back_too(tmp_path, name):
    model = KINDS[name].build()
    sculptor, optimizer = started(model, SculptConfig())
    KINDS[name].loss(model).backward()
    optimizer.step()
    sculptor.save(tmp_path)
    after = {key: value.clone() for key, value in model.state_dict().items()}
    fresh = KINDS[name].build()
    Sculptor.load(fresh, tmp_path)
    assert all(torch.equal(value, after[key]) for key, value in fresh.state_dict().items())


def test_damaged_and_foreign_saves_are_refused(tmp_path):
    model = model_of(torch.bfloat16)
    sculptor, optimizer = started(model, SculptConfig())
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
    with pytest.raises(ValueError, match="has format 99; this version reads format 3"):
        load()
    about.write_text("{")
    with pytest.raises(ValueError, match="is not a sculptor's description"):
        load()
    about.write_text(text)
    (moving,) = tmp_path.glob("coordinates-*.safetensors")
    data = bytearray(moving.read_bytes())
    data[-1] ^= 1
    moving.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{moving.name} was changed"):
        load()
    moving.unlink()
    with pytest.raises(ValueError, match=rf"incomplete: {moving.name} is missing"):
        load()
    about.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no sculptor.json"):
        load()


def test_a_save_in_the_background_is_the_one_of_its_moment(tmp_path, monkeypatch):
    model = model_of()
    sculptor, optimizer = started(model, SculptConfig())
    fit(model, optimizer, 2)
    sculptor.save(tmp_path / "expected")
    go_on, write = threading.Event(), state.tensors_on_disk.write_file

    def wait(*what):
        go_on.wait(60)
        write(*what)

    monkeypatch.setattr(state.tensors_on_disk, "write_file", wait)
    saving = sculptor.save_async(tmp_path / "found")
    fit(model, optimizer, 2)
    sculptor.end_task()
    assert not saving.done()
    go_on.set()
    saving.result()
    assert saving.done()
    states = []
    for name in ("expected", "found"):
        fresh = model_of()
        Sculptor.load(fresh, tmp_path / name)
        states.append(fresh.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        assert not torch.equal(value, model.state_dict()[name]) or name.endswith("bias"), name


def test_what_goes_wrong_in_the_background_is_not_lost(tmp_path):
    sculptor, _ = started(model_of(), SculptConfig())
    (tmp_path / "file").touch()
    sculptor.save_async(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        sculptor.save(tmp_path / "good")
    sculptor.save(tmp_path / "good")
    saving = sculptor.save_async(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        saving.result()
    sculptor.save_async(tmp_path / "better", previous=tmp_path / "good").result()
    one, two = (next((tmp_path / name).glob("task-*")) for name in ("good", "better"))
    assert one.samefile(two)


def save_async(sculptor, path):
    sculptor.save_async(path).result()


@pytest.mark.parametrize("save", [Sculptor.save, save_async])
@pytest.mark.parametrize("when", [1, 2, 3])
def test_an_interrupted_save_leaves_the_one_before_it(tmp_path, monkeypatch, save, when):
    """Into the same directory, another task in the meantime; the first files are complete."""
    model = model_of()
    sculptor, optimizer = started(model, SculptConfig())
    fit(model, optimizer, 2)
    sculptor.save(tmp_path)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    sculptor.end_task([lambda model: model(inputs(torch.float32)[0]).square().sum()])
    sculptor.begin_task(name="second")
    write, calls = state.tensors_on_disk.write_file, 0

    def stop(path, tensors):
        nonlocal calls
        calls += 1
        if calls == when:
            raise OSError("no space left")
        return write(path, tensors)

    monkeypatch.setattr(state.tensors_on_disk, "write_file", stop)
    with pytest.raises(OSError, match="no space left"):
        save(sculptor, tmp_path)
    monkeypatch.setattr(state.tensors_on_disk, "write_file", write)
    fresh = model_of()
    loaded = Sculptor.load(fresh, tmp_path)
    assert loaded._task.name == "first"
    assert not loaded.memory
    assert all(torch.equal(value, saved[name]) for name, value in fresh.state_dict().items())
    loaded.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3, "what was left over is taken away"


@pytest.mark.parametrize("flag", [True, False])
def test_a_task_is_taken_up_whatever_is_frozen_now(tmp_path, flag):
    whole = model_of(torch.float32)
    whole[4].requires_grad_(False)
    flags = [p.requires_grad for p in whole.parameters()]
    sculptor = Sculptor(whole, SculptConfig())
    trained = [row.name for row in sculptor.begin_task().rows]
    assert "4" not in trained
    optimizer = torch.optim.SGD(sculptor.parameters(), lr=1e-3)
    sculptor.attach(optimizer)
    fit(whole, optimizer, 2)
    sculptor.save(tmp_path)
    again = model_of(torch.float32).requires_grad_(flag)
    again.load_state_dict(whole.state_dict())
    (file,) = tmp_path.glob("task-*")
    file.rename(tmp_path / "aside")
    with pytest.raises(ValueError, match="is incomplete"):
        Sculptor.load(again, tmp_path)
    (tmp_path / "aside").rename(file)
    assert all(p.requires_grad == flag for p in again.parameters())
    resumed = Sculptor.load(again, tmp_path)
    assert [name for name, _ in resumed.named_parameters()] == trained
    resumed.end_task()
    sculptor.end_task()
    assert [p.requires_grad for p in again.parameters()] == flags
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True)
    )
