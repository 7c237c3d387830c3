"""`SculptCallback` in several processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from launch import launch
from safetensors.torch import load_file
from test_shards import whole
from test_trainer import CONFIG, LR, rows
from tiny_language import tiny_model
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback, TrainingArguments

from sculpt import SculptCallback
from sculpt.curvature.memory import FILE


def trainer(
    out: Path, batch: int, callback: SculptCallback | None = None, **more: Any
) -> tuple[Trainer, SculptCallback]:
    if dist.is_initialized():
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    callback = callback or SculptCallback(CONFIG, name="first")
    settings = {
        "output_dir": str(out),
        "max_steps": 6,
        "per_device_train_batch_size": batch,
        "learning_rate": LR,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "adamw_torch",
    }
    if dist.is_initialized():
        settings["ddp_backend"] = "gloo"
    arguments = TrainingArguments(**(settings | more))
    return Trainer(tiny_model(), arguments, train_dataset=rows(), callbacks=[callback]), callback


def replicas(out: Path, resume: bool) -> Any:
    run, callback = trainer(out, 4, save_strategy="steps", save_steps=3)
    assert run.args.world_size == 2
    run.train(resume_from_checkpoint=str(out / "checkpoint-3") if resume else None)
    assert callback.certificate is not None
    assert callback.certificate.ok
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return run.model.state_dict(), losses


def test_replicas_learn_what_one_process_learns_and_resume_with_the_same_bits(tmp_path):
    alone, _ = trainer(tmp_path / "alone", 8)
    alone.train()
    together = launch(2, replicas, tmp_path, tmp_path / "run", False)
    again = launch(2, replicas, tmp_path, tmp_path / "run", True)
    for (weights, losses), (resumed, _) in zip(together, again, strict=True):
        for name, weight in alone.model.state_dict().items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)
            assert torch.equal(resumed[name], weights[name]), name
        expected = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
        assert losses == pytest.approx(expected, abs=1e-6)


def remembering(out: Path, batch: int, count: int, **more: Any) -> Any:
    """Two tasks, the second with the memory of the first; its rows, sums and what it chose."""
    first = SculptCallback(CONFIG, name="first", calibration_rows=count)
    trainer(out / "first", batch, first, **more)[0].train()
    memory = out / "first"
    second = SculptCallback(CONFIG, name="second", calibration_rows=count, memory=memory)
    run, _ = trainer(out / "second", batch, second, **more)
    run.train()
    assert second.table is not None
    assert second.sculptor is not None
    weights = whole(run.model.state_dict())
    return second.sculptor.memory.rows, second.sculptor.memory.tensors() | weights


def remembering_divided(out: Path, batch: int, count: int) -> Any:
    divide_on_cpus()
    settings = {"version": 2, "state_dict_type": "FULL_STATE_DICT"}
    more = {"fsdp": True, "fsdp_config": settings, "average_tokens_across_devices": False}
    return remembering(out, batch, count, **more)


@pytest.mark.parametrize(
    ("ways", "count"), [(remembering, 32), (remembering_divided, 32), (remembering_divided, 5)]
)
def test_processes_draw_rows_of_their_own_and_protect_all(ways, count, tmp_path):
    """All 32 rows there are, 16 in each process; or 2 of 5 in each."""
    rows, _ = remembering(tmp_path / "alone", 8, 32)
    assert rows == {"first": 32, "second": 32}
    one, other = launch(2, ways, tmp_path, tmp_path / "together", 4, count)
    assert one[0] == other[0] == {"first": count // 2 * 2, "second": count // 2 * 2}
    for name, value in one[1].items():
        assert torch.equal(other[1][name], value), name
    first = [load_file(tmp_path / out / "first" / FILE) for out in ("alone", "together")]
    for name, value in first[0].items():
        if count == 32 and value.is_floating_point():
            torch.testing.assert_close(first[1][name], value, rtol=1e-3, atol=1e-3, msg=name)


def unequal(out: Path) -> str:
    run, _ = trainer(out, 4, max_steps=-1, num_train_epochs=1)
    run.train_dataset = rows(32 + 16 * dist.get_rank())
    with pytest.raises(ValueError, match="do not agree") as error:
        run.train()
    return str(error.value)


def test_ranks_with_more_data_than_others_are_named(tmp_path):
    for said in launch(2, unequal, tmp_path, tmp_path / "run"):
        assert "rank 0 has training steps 4, rank 1 has 6" in said


def divide_on_cpus() -> None:
    """accelerate divides a model on accelerators only: let it take CPUs for some."""
    original = AcceleratorState.__init__

    def init(self: Any, *parts: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        original(self, *parts, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def divided(out: Path, layout: str, stop: int | None) -> Any:
    """All six steps; or as far as `stop`, and then from there in another Trainer."""
    divide_on_cpus()
    settings = {
        "fsdp": True,
        "fsdp_config": {"version": 2, "state_dict_type": layout},
        "save_strategy": "steps",
        "save_steps": 3,
        "average_tokens_across_devices": False,
    }
    if stop is not None:
        first, _ = trainer(out, 4, **settings)
        first.add_callback(Stop(stop))
        first.train()
    run, callback = trainer(out, 4, **settings)
    run.train(resume_from_checkpoint=None if stop is None else str(out / f"checkpoint-{stop}"))
    assert isinstance(run.model, FSDPModule)
    assert isinstance(run.model.model.layers[0], FSDPModule)
    assert callback.certificate is not None
    assert callback.certificate.ok
    assert callback.table is not None
    assert len(callback.table.rows) == 14
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return whole(run.model.state_dict()), losses


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("layout", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_divided_model_learns_what_one_process_learns_and_resumes(layout, tmp_path):
    alone, _ = trainer(tmp_path / "alone", 8)
    alone.train()
    together = launch(2, divided, tmp_path, tmp_path / "run", layout, None)
    again = launch(2, divided, tmp_path, tmp_path / "again", layout, 3)
    for (weights, losses), (resumed, resumed_losses) in zip(together, again, strict=True):
        for name, weight in alone.model.state_dict().items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)
            assert torch.equal(resumed[name], weights[name]), name
        expected = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
        assert losses == pytest.approx(expected, abs=1e-6)
        assert resumed_losses == losses


def test_the_first_fsdp_is_refused_by_name(tmp_path, monkeypatch):
    run, _ = trainer(tmp_path, 8)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RuntimeError, match=r"FSDP version 1.*fsdp_version: 2"):
        SculptCallback(CONFIG).on_init_end(run.args, run.state, run.control, model=run.model)
