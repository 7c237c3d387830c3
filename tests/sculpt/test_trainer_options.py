"""Options of `TrainingArguments` that meet the task in unusual ways, and runs that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import sculpt
from sculpt import SculptCallback
from tests.sculpt.test_trainer import CONFIG, Collator, arguments, rows, trainer
from tests.sculpt.tiny_language import tiny_model


@pytest.mark.parametrize(
    ("dtype", "only_model"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)],
    ids=["with coordinates", "plain models", "plain models of bfloat16"],
)
def test_the_best_weights_come_back(dtype, only_model, tmp_path):
    """`save_only_model` leaves plain models alone on the disk."""
    before = {n: t.clone() for n, t in tiny_model().to(dtype).state_dict().items()}
    made, callback = trainer(
        tmp_path,
        tiny_model().to(dtype),
        learning_rate=3e-2,  # The loss on other rows gets worse and worse.
        warmup_steps=0,
        save_strategy="steps",
        save_steps=2,
        save_only_model=only_model,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    made.train()
    best = Path(made.state.best_model_checkpoint)
    assert best.name != "checkpoint-8", "expected the loss to have risen"
    assert (best / "sculptor").exists() is not only_model
    assert callback.certificate.ok
    for name, value in load_file(best / "model.safetensors").items():
        after = made.model.state_dict()[name]
        if dtype == torch.float32:
            assert torch.equal(after, value), name
        else:  # Random roundings of the steps are gone, as after any task.
            change = (value.float() - before[name].float()).norm()
            assert float((after.float() - value.float()).norm()) <= 0.2 * float(change), name
    if dtype == torch.float32:
        assert made.evaluate()["eval_loss"] == pytest.approx(made.state.best_metric, rel=1e-6)


class FullMemory(Collator):
    """Fails as a device without memory does, where a batch has more than `most` rows."""

    def __init__(self, most: int, after: int) -> None:
        super().__init__()
        self.most, self.after = most, after

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(examples)
        if len(examples) > self.most and len(self.batches) > self.after:
            raise RuntimeError("CUDA out of memory. (a test)")
        return batch


@pytest.mark.parametrize("after", [0, 3])
def test_a_smaller_batch_is_found(after, tmp_path):
    """At the first batch, and when steps were taken already; rates are never stacked."""
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 8}
    given = {"data_collator": FullMemory(4, after)}
    made, callback = trainer(tmp_path, given=given, **options)
    made.train()
    assert made.state.global_step == 8
    assert made.state.train_batch_size <= 4
    assert callback.certificate.ok
    # No farther than eleven steps at the rate at most.
    assert 1e-4 < max(row.change for row in callback.certificate.rows) < 1.0
    changes = [row.change for row in callback.certificate.rows]
    twin, plain = trainer(tmp_path / "plain")
    twin.train()
    for change, row in zip(changes, plain.certificate.rows, strict=True):
        assert 0.3 < change / row.change < 3.0


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluations_that_round_the_weights_for_good_are_refused(name, tmp_path):
    model = tiny_model()
    with pytest.raises(RuntimeError, match=rf"{name}=True.*would leave in torch\.b?float16"):
        trainer(tmp_path, model, **{name: True})
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    dtype = torch.bfloat16 if name.startswith("bf16") else torch.float16
    made, callback = trainer(tmp_path, model.to(dtype), **{name: True})
    made.train()
    made.evaluate()
    assert callback.certificate.ok


def test_masked_labels_end_in_an_error(tmp_path):
    model = tiny_model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    masked = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows()]
    made, callback = trainer(tmp_path, model, given={"train_dataset": masked})
    with pytest.raises(RuntimeError, match=r"none of the \d steps .*Are all labels masked"):
        made.train()
    assert callback.certificate is None
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    trainer(tmp_path, model)[0].train()


class Fails(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise ValueError("something else went wrong")


def test_after_an_exception_the_model_is_free_again(tmp_path):
    model = tiny_model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    made, _ = trainer(tmp_path, model, [Fails()])
    with pytest.raises(ValueError, match="something else"):
        made.train()
    with pytest.raises(RuntimeError, match=r"a task is running .*sculpt\.abandon\(model\)"):
        trainer(tmp_path, model)
    sculpt.abandon(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    again, callback = trainer(tmp_path, model)
    again.train()
    assert callback.certificate.ok


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("deepspeed", {"zero_optimization": {}}, "does not work with deepspeed=.*fsdp with ver"),
        ("_n_gpu", 2, "one device in each process; this one has 2.*torchrun"),
    ],
)
def test_what_others_would_divide_is_refused(name, value, message, tmp_path):
    model = tiny_model()
    given = arguments(tmp_path)
    setattr(given, name, value)
    with pytest.raises(RuntimeError, match=message):
        SculptCallback(CONFIG).on_init_end(given, None, None, model=model)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
