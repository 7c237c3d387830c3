"""`SculptCallback` in `transformers.Trainer`: the plain loop's losses, plain models, restarts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from sculpt import SculptCallback, SculptConfig
from sculpt.certificate.disk import verify_checkpoints
from tests.sculpt.small_models import begin

CONFIG = SculptConfig(unfreeze_rank_ratio=0.25)
LR = 1e-3


def rows(count: int = 32, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 40, (count, 10), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


class Collator:
    """Stacks rows, and remembers the batches that it made."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []

    def __call__(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = {key: torch.stack([row[key] for row in examples]) for key in examples[0]}
        self.batches.append({key: value.clone() for key, value in batch.items()})
        return batch


class Crash(TrainerCallback):
    """Ends the process, as far as a test can, in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def arguments(out: Path, **more: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(out),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": LR,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "weight_decay": 0.01,
        "optim": "adamw_torch",
    }
    return TrainingArguments(**(defaults | more))


def trainer(
    out: Path,
    model: Any = None,
    callbacks: list[Any] | None = None,
    sculpted: SculptCallback | None = None,
    given: dict[str, Any] | None = None,
    **more: Any,
) -> tuple[Trainer, SculptCallback]:
    """A trainer of these arguments, beside which it may be `given` what a `Trainer` takes."""
    sculpted = sculpted or SculptCallback(CONFIG, name="first")
    usual = {
        "model": model or tiny_model(),
        "args": arguments(out, **more),
        "data_collator": Collator(),
        "train_dataset": rows(),
        "eval_dataset": rows(8, seed=1),
        "callbacks": [sculpted, *(callbacks or [])],
    }
    return Trainer(**(usual | (given or {}))), sculpted


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def plain_loop(
    batches: list[dict[str, torch.Tensor]], rates: list[float], decay: float, accumulate: int = 1
) -> tuple[list[float], Any]:
    """Losses and the model of the same steps in a loop of one's own."""
    model = tiny_model().train()
    sculptor, optimizer = begin(model, CONFIG, lr=0.0, weight_decay=decay)
    losses = []
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        total = 0.0
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            loss = model(**batch).loss / accumulate
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(sculptor.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    sculptor.end_task()
    return losses, model


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_losses_are_those_of_a_plain_loop(accumulate, tmp_path):
    made, callback = trainer(tmp_path, gradient_accumulation_steps=accumulate)
    made.train()
    rates = [LR * (step / 2 if step < 2 else (8 - step) / 6) for step in range(8)]
    expected, model = plain_loop(made.data_collator.batches, rates, 0.01, accumulate)
    assert losses(made) == pytest.approx(expected, rel=1e-5)
    assert all(row.change > 1e-4 for row in callback.certificate.rows)
    for name, value in made.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-6)
    assert callback.certificate.ok


def test_what_is_saved_is_plain_and_proven(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "before")
    layout = {n: (t.shape, t.dtype) for n, t in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    made, callback = trainer(tmp_path / "out", model, save_strategy="steps", save_steps=4)
    made.train()
    made.save_model(str(tmp_path / "after"))

    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    for place in ("after", "out/checkpoint-4", "out/checkpoint-8"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / place).state_dict()
        assert {n: (t.shape, t.dtype) for n, t in loaded.items()} == layout
    from_disk = verify_checkpoints(tmp_path / "before", tmp_path / "after", CONFIG)
    assert from_disk.ok
    changed = [row.name for row in from_disk.certificate.rows if row.change > 0]
    written = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert sorted(changed) == sorted(row["name"] for row in written["rows"])
    assert written["ok"] is True
    assert written["task"] == "first"
    assert made.state.log_history[-1]["sculpt/certificate_holds"] == 1.0
    assert callback.table.trainable_elements == sum(
        row.trainable_rank**2 for row in callback.table.rows
    )
    # Bases and original weights are written once; the second checkpoint has a link to them.
    fixed = [
        next((tmp_path / "out" / f"checkpoint-{step}").glob("sculptor/task-*")) for step in (4, 8)
    ]
    assert fixed[0].samefile(fixed[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["from the base model", "from the checkpoint"])
def test_a_restart_ends_with_the_same_bits(dtype, start, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    tiny_model().save_pretrained(tmp_path / "base")

    def load(place: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / place, dtype=dtype)

    whole, _ = trainer(tmp_path / "whole", load("base"), **saving)
    whole.train()

    killed, _ = trainer(tmp_path / "killed", load("base"), [Crash(4)], **saving)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    place = "base" if start == "from the base model" else "killed/checkpoint-3"
    resumed, callback = trainer(tmp_path / "killed", load(place), **saving)
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == 8
    assert callback.certificate.ok
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert losses(resumed)[-5:] == losses(whole)[-5:]
    # The next checkpoint after a restart links to the one before it, too.
    fixed = [
        next((tmp_path / "killed" / f"checkpoint-{step}").glob("sculptor/task-*"))
        for step in (3, 6)
    ]
    assert fixed[0].samefile(fixed[1])


class StateInGroups(torch.optim.AdamW):
    """Counts its steps in its groups, as schedule-free optimizers and Prodigy do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_optimizers_may_keep_their_state_in_groups(tmp_path):
    kind = (StateInGroups, {"lr": LR})
    made, callback = trainer(tmp_path, given={"optimizer_cls_and_kwargs": kind})
    made.train()
    assert {group["k"] for group in made.optimizer.param_groups} == {8}
    assert callback.certificate.ok


def test_mixed_precision_keeps_the_weights_exact(tmp_path):
    made, callback = trainer(tmp_path, bf16=True)
    made.train()
    assert made.model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert all(row.change > 1e-4 for row in callback.certificate.rows)
    assert callback.certificate.ok


def test_metrics_reach_the_services_of_the_trainer(tmp_path, monkeypatch):
    logged: list[tuple[int, dict[str, float]]] = []

    class Recorder(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            logged.append((state.global_step, dict(logs)))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    made, callback = trainer(tmp_path, report_to=["recorder"])
    made.train()
    ours = [(s, v) for s, logs in logged for n, v in logs.items() if n == "sculpt/worst_leak"]
    assert ours == [(8, callback.certificate.worst.leak)]
    begun = [(s, n, v) for s, logs in logged for n, v in logs.items() if "sculpt/mean" in n]
    ranks, energies = zip(*((r.preserved, r.energy) for r in callback.table.rows), strict=True)
    assert begun == [
        (0, "sculpt/mean_preserved_rank", sum(ranks) / len(ranks)),
        (0, "sculpt/mean_energy_kept", sum(energies) / len(energies)),
    ]


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(TypeError, match="config must be a SculptConfig"):
        SculptCallback({"unfreeze_rank_ratio": 0.25})

    made, callback = trainer(tmp_path)
    with pytest.raises(RuntimeError, match="belongs to another Trainer"):
        Trainer(tiny_model(), arguments(tmp_path), callbacks=[callback])
    made.train()
    with pytest.raises(RuntimeError, match="the task of this SculptCallback has ended"):
        made.train()

    late, _ = trainer(tmp_path, given={"callbacks": []})
    late.add_callback(SculptCallback(CONFIG))
    with pytest.raises(RuntimeError, match="pass it to the constructor"):
        late.train()
    again, _ = trainer(tmp_path, given={"model": None, "model_init": lambda: tiny_model()})
    with pytest.raises(RuntimeError, match="model_init"):
        again.train()
    model = tiny_model()
    optimizer = torch.optim.AdamW(list(model.parameters())[:3])
    other, _ = trainer(tmp_path, model, given={"optimizers": (optimizer, None)})
    with pytest.raises(ValueError, match="holds 0 of the 14"):
        other.train()


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    plain, _ = trainer(tmp_path / "plain", given={"callbacks": []}, **saving)
    plain.train()
    made, _ = trainer(tmp_path / "out", **saving)
    made.train()

    # Trained without the callback: its optimizer held all weights.
    made, _ = trainer(tmp_path / "plain", **saving)
    with pytest.raises(ValueError, match=r"parameter group|not finished, or not made"):
        made.train(resume_from_checkpoint=True)
    # Of a checkpoint in another place, whose number is that of one here.
    moved = tmp_path / "elsewhere" / "checkpoint-6"
    moved.parent.mkdir()
    (tmp_path / "out" / "checkpoint-6").rename(moved)
    made, _ = trainer(tmp_path / "out", **saving)
    with pytest.raises(ValueError, match="was not finished, or not made with SculptCallback"):
        made.train(resume_from_checkpoint=str(moved))
    made, _ = trainer(tmp_path / "out", resume_from_checkpoint=str(moved), **saving)
    made.train(resume_from_checkpoint=str(moved))
    assert made.state.global_step == 8
    # Made with another configuration.
    other = SculptCallback(SculptConfig(unfreeze_rank_ratio=0.25, seed=7))
    made, _ = trainer(tmp_path / "out", sculpted=other, **saving)
    with pytest.raises(ValueError, match="another configuration"):
        made.train(resume_from_checkpoint=True)
