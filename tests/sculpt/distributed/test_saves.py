"""A divided task on disk, and how it goes on in another number of processes."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.distributed as dist
from launch import launch
from tasks import network, started, steps
from test_shards import divided, whole
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from sculpt import SculptConfig, Sculptor
from sculpt.storage.tensors import fill

CONFIGS = [
    (torch.float32, SculptConfig(others="train")),
    (torch.bfloat16, SculptConfig(coordinates="full")),
    (torch.bfloat16, SculptConfig(constraint="core")),
]


def begin(folder, model, config):
    # SGD has no state, whose saving is the loop's.
    sculptor, optimizer = started(model, config, kind=torch.optim.SGD, lr=0.05)
    steps(model, optimizer, 0, 3)
    sculptor.save(folder)
    return sculptor, optimizer


def resume(folder, model, weights):
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            fill(parameter, weights[name])
    return Sculptor.load(model, folder)


def end(model, sculptor, optimizer=None):
    if optimizer is None:
        optimizer = torch.optim.SGD(sculptor.parameters(), lr=0.05)
        sculptor.attach(optimizer)
    steps(model, optimizer, 3, 6)
    certificate = sculptor.verify()
    assert (certificate.ok, certificate.task) == (True, "first")
    sculptor.end_task()
    weights = model.state_dict()
    return whole(weights) if dist.is_initialized() else weights


def save_all(folder):
    kept = []
    for index, (dtype, config) in enumerate(CONFIGS):
        model = divided(dtype=dtype)
        sculptor, optimizer = begin(folder / str(index), model, config)
        middle = whole(model.state_dict())
        kept.append((middle, end(model, sculptor, optimizer)))
    return kept


def load_all(folder, middles):
    return [
        end(model := divided(dtype=dtype), resume(folder / str(index), model, middle))
        for index, ((dtype, _), middle) in enumerate(zip(CONFIGS, middles, strict=False))
    ]


def near(weights, expected):
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)


def test_a_task_goes_on_in_any_number_of_processes(tmp_path):
    middles, ends = zip(*launch(4, save_all, tmp_path, tmp_path / "saves")[0], strict=True)
    for size in (4, 2, 1):
        folder = tmp_path / f"{size} processes"
        folder.mkdir()
        found = launch(size, load_all, folder, tmp_path / "saves", middles)[0]
        if size == 4:
            for ours, expected in zip(found, ends, strict=True):
                assert all(torch.equal(ours[name], expected[name]) for name in expected)
        near(found[0], ends[0])  # in float32
    alone = network()
    near(end(alone, resume(tmp_path / "saves" / "0", alone, middles[0])), ends[0])


def test_a_save_of_one_process_goes_on_in_several(tmp_path):
    model = network()
    sculptor, optimizer = begin(tmp_path / "saves" / "0", model, CONFIGS[0][1])
    middle = {name: value.clone() for name, value in model.state_dict().items()}
    weights = end(model, sculptor, optimizer)
    for [found] in launch(2, load_all, tmp_path, tmp_path / "saves", [middle]):
        near(found, weights)


def full_disk(*_):
    raise OSError("no space left")


def save_again(folder):
    """Saves that are cut off, replaced, linked and damaged."""
    model = divided(dtype=torch.bfloat16)
    sculptor, optimizer = begin(folder / "a", model, SculptConfig())
    middle = whole(model.state_dict())
    sculptor.save(folder / "b", previous=folder / "a")
    sculptor.save(folder / "a", previous=folder / "a")
    dist.barrier()
    tasks = [next((folder / name).glob("task-*")) for name in "ab"]
    first = next(iter(sorted(tasks[0].glob("*.safetensors"))))
    assert os.path.samefile(first, tasks[1] / first.name), "the fixed part is linked"
    assert len(list((folder / "a").iterdir())) == 3, "the earlier save is taken away"

    about = (folder / "a" / "sculptor.json").read_text()
    steps(model, optimizer, 3, 4)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(HuggingFaceStorageWriter, "write_data", full_disk)
        with pytest.raises(OSError, match=r"by rank.*1.*no space left"):
            sculptor.save(folder / "a")
    dist.barrier()
    assert (folder / "a" / "sculptor.json").read_text() == about
    sculptor.end_task()
    other = divided(dtype=torch.bfloat16)
    loaded = resume(folder / "a", other, middle)
    assert loaded.verify().ok
    loaded.end_task()

    dist.barrier()
    if dist.get_rank() == 0:
        names = json.loads(about)["checksums"]  # What is fixed is linked to the other save.
        name = next(name for name in names if name.startswith("coordinates"))
        with (folder / "a" / name).open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"x")
    dist.barrier()
    with pytest.raises(ValueError, match="was changed"):
        resume(folder / "a", divided(dtype=torch.bfloat16), middle)
    with pytest.raises(ValueError, match="the moment of saving"):
        resume(
            folder / "b", divided(dtype=torch.bfloat16), whole(network(torch.bfloat16).state_dict())
        )


def test_saves_that_are_replaced_cut_off_or_damaged(tmp_path):
    launch(2, save_again, tmp_path, tmp_path / "saves")
