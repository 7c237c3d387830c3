"""`SculptCallback` in several processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import launch
from test_shards import whole
from test_trainer import CONFIG, LR, rows
from tiny_language import tiny_model
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from sculpt import SculptCallback


def trainer(out: Path, batch: int, **more: Any) -> tuple[Trainer, SculptCallback]:
    if dist.is_initialized():
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    callback = SculptCallback(CONFIG, name="first")
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


def divided(out: Path) -> Any:
    """accelerate divides a model on accelerators only: here the test does what it would do."""
    run, callback = trainer(
        out,
        4,
        fsdp=True,
        fsdp_config={"version": 2},
        max_grad_norm=0.0,
        average_tokens_across_devices=False,
    )
    prepare = run.accelerator.prepare

    def prepare_both(*parts: Any) -> Any:
        if len(parts) != 2:
            return prepare(*parts)
        model, optimizer = parts
        names = {parameter: name for name, parameter in model.named_parameters()}
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        new = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [new[names[parameter]] for parameter in group["params"]]
        return model, run.accelerator.prepare_optimizer(optimizer)

    run.accelerator.prepare = prepare_both
    run.train()
    assert callback.certificate is not None
    assert callback.certificate.ok
    return whole(run.model.state_dict())


def test_a_divided_model_learns_what_one_process_learns(tmp_path):
    alone, _ = trainer(tmp_path / "alone", 8, max_grad_norm=0.0)
    alone.train()
    for weights in launch(2, divided, tmp_path, tmp_path / "run"):
        for name, weight in alone.model.state_dict().items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)


def test_the_first_fsdp_is_refused_by_name(tmp_path, monkeypatch):
    run, _ = trainer(tmp_path, 8)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RuntimeError, match=r"FSDP version 1.*fsdp_version: 2"):
        SculptCallback(CONFIG).on_init_end(run.args, run.state, run.control, model=run.model)
