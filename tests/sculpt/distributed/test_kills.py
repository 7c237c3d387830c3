"""One process dies at a random moment: the job ends, and goes on from its last save."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from launch import SECONDS, launch
from tasks import batch, share, started, steps
from test_shards import divided, whole
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.multiprocessing.spawn import ProcessException

from sculpt import SculptConfig, Sculptor
from sculpt.storage.files import write_json

STEPS = 6


def worker(folder: Path, death: float | None) -> dict[str, torch.Tensor]:
    """Steps with a save after each; the last process dies after `death` seconds."""
    if death is not None and dist.get_rank() == dist.get_world_size() - 1:
        threading.Timer(death, os.kill, (os.getpid(), signal.SIGKILL)).start()
    model = divided()
    last = folder / "last.json"
    begin, previous = 0, None
    if last.exists():
        begin = int(last.read_text())
        previous = folder / f"step-{begin}"
        # float32 weights follow from what is saved.
        sculptor = Sculptor.load(model, previous)
    else:
        sculptor = Sculptor(model, SculptConfig())
        sculptor.begin_task()
    # The moments of AdamW stand for whatever state a loop has to save.
    optimizer = torch.optim.AdamW(sculptor.parameters(), lr=0.01)
    if previous is not None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        dcp.load(moments(sculptor, optimizer), checkpoint_id=previous / "optimizer")
    sculptor.attach(optimizer)
    for step in range(begin, STEPS):
        steps(model, optimizer, step, step + 1)
        now = folder / f"step-{step + 1}"
        saving = sculptor.save_async(now, previous=previous)
        dcp.save(moments(sculptor, optimizer), checkpoint_id=now / "optimizer")
        saving.result()
        previous = now
        if dist.get_rank() == 0:
            write_json(last, step + 1)
        dist.barrier()
    assert sculptor.verify().ok
    sculptor.end_task()
    return whole(model.state_dict())


def moments(sculptor, optimizer):
    return {
        f"{name}/{key}": value
        for name, parameter in sculptor.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_job_goes_on_with_the_same_bits(kills, tmp_path):
    def run(folder: Path, death: float | None = None):
        folder.mkdir(exist_ok=True)
        return launch(2, worker, folder, folder / "saves", death)

    begin = time.monotonic()
    expected = run(tmp_path / "whole")
    whole_time = time.monotonic() - begin
    generator = random.Random(0)
    errors = []
    folder = tmp_path / "killed"
    for _ in range(kills):
        begin = time.monotonic()
        try:
            run(folder, generator.uniform(0.1, 0.7) * whole_time)
        except ProcessException as error:
            errors.append(str(error))
            assert time.monotonic() - begin < SECONDS
        else:
            # It was done before its time had come.
            folder = folder.with_name(folder.name + "x")
    found = run(folder)
    assert errors
    assert all("SIGKILL" in error or "Connection" in error for error in errors), errors
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def save_twice(folder, how):
    """A save, a step, and another one into the same directory while the last process dies."""
    model = divided()
    sculptor, optimizer = started(model, kind=torch.optim.SGD, lr=0.05)
    for number in range(2):
        model(share(batch(0, number)[0])).square().mean().backward()
        optimizer.step()
        if number == 1 and dist.get_rank() == dist.get_world_size() - 1:
            HuggingFaceStorageWriter.write_data = die
        if how == "save":
            sculptor.save(folder / "save")
        else:
            sculptor.save_async(folder / "save").result()
        if dist.get_rank() == 0:
            torch.save(whole_of_first(model), folder / f"weights-{number}.pt")
        dist.barrier()


def whole_of_first(model):
    return {name: tensor.to_local() for name, tensor in model.state_dict().items()}


def load_first(folder):
    model = divided()
    sculptor = Sculptor.load(model, folder / "save")
    assert sculptor.verify().ok
    return whole_of_first(model)


@pytest.mark.parametrize("how", ["save", "save_async"])
def test_a_process_that_dies_in_a_save_leaves_the_one_before_it(how, tmp_path):
    begin = time.monotonic()
    with pytest.raises(ProcessException, match=r"SIGKILL|Connection|closed"):
        launch(2, save_twice, tmp_path, tmp_path, how)
    assert time.monotonic() - begin < SECONDS
    assert not (tmp_path / "weights-1.pt").exists()
    found = launch(2, load_first, tmp_path, tmp_path)[0]
    expected = torch.load(tmp_path / "weights-0.pt")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
