"""What one training run with `SculptCallback` protects in the next, and that none notices it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny_language import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from sculpt import SculptCallback, SculptConfig, Sculptor
from sculpt.messages import SculptWarning
from tests.sculpt.test_trainer import CONFIG, Collator, Crash, rows, trainer

FILE = "sculpt_memory.safetensors"


def callback(name: str, memory: Any = None, config: SculptConfig = CONFIG, **more: Any) -> Any:
    return SculptCallback(config, name=name, memory=memory, **more)


def learn(out: Path, sculpted: SculptCallback, model: Any = None, **given: Any) -> Any:
    made, _ = trainer(out, model, sculpted=sculpted, given=given)
    made.train()
    return made


def assert_same_factors(one: Any, other: Any, **tolerance: float) -> None:
    assert one.factors.keys() == other.factors.keys()
    for key, factor in one.factors.items():
        for name, tensor in factor.tensors().items():
            torch.testing.assert_close(
                tensor, other.factors[key].tensors()[name], msg=key, **tolerance
            )


def test_a_training_run_is_protected_in_the_next(tmp_path):
    first = callback("first")
    made = learn(tmp_path / "first", first)
    assert first.sculptor.memory.rows == {"first": 32}
    # All rows there are, as a loop of one's own would protect them.
    own = Sculptor(made.model, CONFIG)
    own.protect([Collator()(rows())], "first")
    assert_same_factors(first.sculptor.memory, own.memory, rtol=1e-3, atol=1e-3)

    # Another process: the model and the memory from the disk.
    made.save_model(str(tmp_path / "first"))
    moved = {}
    for name, memory in (("protected", tmp_path / "first"), ("weights", None)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
        other = rows(seed=5)
        batches = [Collator()(given) for given in (rows(), other)]
        before = [model(**batch).logits.detach() for batch in batches]
        second = callback("second", memory)
        learn(tmp_path / name, second, model, train_dataset=other)
        assert second.certificate.ok
        after = [model.eval()(**batch).logits.detach() for batch in batches]
        earlier, own = (float((a - b).norm()) for a, b in zip(after, before, strict=True))
        moved[name] = earlier / own
        expected = {"first": 32, "second": 32} if memory else {"second": 32}
        assert second.sculptor.memory.rows == expected
        assert (tmp_path / name / FILE).is_file()
    assert moved["protected"] < 0.8 * moved["weights"], moved


def test_the_next_task_begins_with_its_own_rows(tmp_path):
    """The subspaces are those that a loop of one's own chooses with these rows."""
    first = callback("first")
    made = learn(tmp_path / "first", first)
    other = rows(seed=5)
    twin = AutoModelForCausalLM.from_config(made.model.config)
    twin.load_state_dict(made.model.state_dict())
    sculptor = Sculptor(twin, CONFIG)
    sculptor.protect([Collator()(rows())], "first")
    sculptor.begin_task([Collator()(other)])
    second, _ = trainer(
        tmp_path / "second",
        made.model,
        sculpted=callback("second", first.sculptor.memory),
        given={"train_dataset": other},
    )
    begun = next(c for c in second.callback_handler.callbacks if isinstance(c, SculptCallback))
    for name, matrix in sculptor._running().matrices.items():
        bases = begun.sculptor._running().matrices[name].bases
        assert bases.method == matrix.bases.method
        assert bases.method.startswith("curvature")
        for one, same in ((bases.U, matrix.bases.U), (bases.V, matrix.bases.V)):
            # The same span: the cosines of all angles between the two are 1.
            cosines = torch.linalg.svdvals(one.double().mT @ same.double())
            torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-3)


class Restless(Collator):
    """Uses every generator there is, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        torch.rand(1)
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(1))]  # noqa: NPY002
        drawn.append(float(torch.rand(1, generator=self.generator)))
        tensors = [{k: torch.as_tensor(v) for k, v in row.items()} for row in examples]
        batch = super().__call__(tensors)
        self.batches[-1]["drawn"] = torch.tensor(drawn, dtype=torch.float64)
        return batch


class Masking(Collator):
    """Learns some of the tokens only, drawn anew each time."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(examples)
        batch["labels"] = batch["labels"].masked_fill(torch.rand(batch["labels"].shape) < 0.5, -100)
        return batch


class Draws(TrainerCallback):
    """Uses random numbers before a task begins."""

    def on_init_end(self, *_: Any, **__: Any) -> None:
        torch.rand(3)


def test_what_is_drawn_depends_on_the_seed_alone(tmp_path):
    """Rows, and what the collator makes of them by random numbers."""
    drawn = []
    for seed, before in ((0, []), (0, [Draws()]), (1, [])):
        sculpted = callback("first", calibration_rows=8)
        given = {"callbacks": [*before, sculpted], "data_collator": Masking()}
        made, _ = trainer(tmp_path, given=given, seed=seed)
        drawn.append(sculpted._rows.batches(made.model))
    assert [len(batch["input_ids"]) for batch in drawn[0]] == [4, 4]
    # One after the other, where whole batches might not fit.
    for saving in ("auto_find_batch_size", "gradient_checkpointing"):
        sculpted = callback("first", calibration_rows=8)
        made, _ = trainer(tmp_path, sculpted=sculpted, **{saving: True})
        assert [len(b["input_ids"]) for b in sculpted._rows.batches(made.model)] == [1] * 8
    for name in ("input_ids", "labels"):
        one, same, other = (torch.cat([batch[name] for batch in batches]) for batches in drawn)
        assert torch.equal(one, same), name
        assert not torch.equal(one, other), name


def plain_rows() -> list[dict[str, list[int]]]:
    return [{name: value.tolist() for name, value in row.items()} for row in rows()]


def stream() -> Any:
    return IterableDataset.from_generator(plain_rows().__iter__).shuffle(seed=4, buffer_size=8)


@pytest.mark.parametrize(
    "data", [rows, lambda: Dataset.from_list(plain_rows()), stream], ids=["list", "table", "stream"]
)
def test_the_trainer_does_not_notice_what_is_drawn(data, tmp_path):
    """Rows, their order, and all random numbers are those of a Trainer without a task."""
    first = callback("first")
    learn(tmp_path / "first", first)
    seen = []
    for more in ([], [callback("second", first.sculptor.memory)]):
        given = {"data_collator": Restless(), "train_dataset": data(), "callbacks": more}
        made, _ = trainer(tmp_path / "second", given=given)
        made.train()
        seen.append([*made.data_collator.batches, {"after": torch.rand(3)}])
    assert first.sculptor.memory.rows == {"first": 32, "second": 32}
    assert len(seen[0]) == len(seen[1]) > 8
    for one, other in zip(*seen, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("start", ["from the base model", "from the checkpoint"])
def test_a_restart_ends_with_the_same_memory(start, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    first = callback("first")
    made = learn(tmp_path / "first", first)
    made.save_model(str(tmp_path / "first"))

    def next_task(out: str, place: str, *more: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / place)
        sculpted = callback("second", tmp_path / "first")
        given = {"train_dataset": rows(seed=5)}
        return trainer(tmp_path / out, model, list(more), sculpted, given, **saving)

    whole, one = next_task("whole", "first")
    whole.train()
    killed, _ = next_task("killed", "first", Crash(4))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    place = "first" if start == "from the base model" else "killed/checkpoint-3"
    resumed, other = next_task("killed", place)
    resumed.train(resume_from_checkpoint=True)
    assert other.sculptor.memory.rows == one.sculptor.memory.rows == {"first": 32, "second": 32}
    assert_same_factors(one.sculptor.memory, other.sculptor.memory, rtol=0.0, atol=0.0)
    assert (tmp_path / "whole" / FILE).read_bytes() == (tmp_path / "killed" / FILE).read_bytes()


def test_weights_alone_draw_nothing(tmp_path):
    collator = Restless()
    config = SculptConfig(unfreeze_rank_ratio=0.25, subspaces="weights")
    sculpted = callback("first", config=config, calibration_rows=4)
    made, _ = trainer(tmp_path, sculpted=sculpted, given={"data_collator": collator})
    made.train()
    assert not sculpted.sculptor.memory
    assert not (tmp_path / FILE).exists()
    with pytest.raises(ValueError, match="subspaces='weights' does not ask for"):
        callback("second", tmp_path, config=config)


def test_rows_that_teach_nothing_are_not_drawn(tmp_path):
    """They would make the loss of their batch no number."""
    masked = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows(24, 7)]
    sculpted = callback("first", calibration_rows=16)
    given = {"train_dataset": masked + rows(12)}
    made, _ = trainer(tmp_path, sculpted=sculpted, given=given, per_device_train_batch_size=1)
    made.train()
    assert sculpted.sculptor.memory.rows == {"first": 12}


class NoLoss(nn.Module):
    """Gives logits, and leaves the loss to the Trainer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 16)
        self.layer = nn.Linear(16, 16)
        self.head = nn.Linear(16, 40)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.layer(self.embed(input_ids)).relu())}


def own_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())


def summed(model: nn.Module) -> torch.Tensor:
    batch = Collator()(rows(8))
    loss = own_loss(model(batch["input_ids"]), batch["labels"])
    return loss * batch["labels"].numel()


def test_a_model_without_loss_is_told_of_before_training(tmp_path):
    def make(sculpted: SculptCallback, remove: bool = False) -> Any:
        given = {"compute_loss_func": own_loss, "eval_dataset": None}
        more = {"label_names": [] if remove else ["labels"], "remove_unused_columns": remove}
        return trainer(tmp_path, NoLoss(), None, sculpted, given, **more)[0]

    said = r"nothing of this task will be protected.*{}.*calibration="
    with pytest.warns(SculptWarning, match=said.format("gives no loss for the batches")):
        make(callback("first"), remove=True)
    with pytest.warns(SculptWarning, match=said.format("does not take the batches: TypeError")):
        made = make(callback("first"))
    made.train()
    assert not (tmp_path / FILE).exists()
    # Functions that return a loss serve, at both ends of a task.
    first = callback("first", calibration=(function for function in [summed]))
    make(first).train()
    assert sum(first.sculptor.memory.rows.values()) == 1
    second = callback("second", first.sculptor.memory, calibration=[summed])
    make(second)
    assert all("ratio" in row.method for row in second.table.rows)


def test_curvature_does_not_begin_without_rows_or_memory(tmp_path):
    config = SculptConfig(unfreeze_rank_ratio=0.25, subspaces="curvature")
    model = tiny_model()
    with pytest.raises(ValueError, match=r"subspaces='curvature' needs a memory="):
        trainer(tmp_path, model, sculpted=callback("first", config=config))
    given = {"train_dataset": None}
    with pytest.raises(ValueError, match=r"nothing of this task will.*without train_dataset"):
        trainer(tmp_path, model, sculpted=callback("first", config=config), given=given)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_a_stream_that_is_read_once_is_left_to_training(tmp_path):
    class Once(torch.utils.data.IterableDataset):
        def __init__(self) -> None:
            self.rows = iter(rows(64))

        def __iter__(self) -> Any:
            return self.rows

    given = {"train_dataset": Once()}
    with pytest.warns(SculptWarning, match="can be read but once"):
        made, _ = trainer(tmp_path, given=given)
    made.train()
    first = made.data_collator.batches[0]["input_ids"]
    assert torch.equal(first, torch.stack([row["input_ids"] for row in rows(64)[:4]]))


def test_mixed_precision_is_that_of_training(tmp_path):
    """Rows pass through the model under autocast at both ends of a task."""
    dtypes = []
    model = tiny_model()
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda _, args, output: dtypes.append(output.dtype))
    first = callback("first")
    made, _ = trainer(tmp_path, model, sculpted=first, bf16=True)
    assert dtypes == [torch.bfloat16]
    made.train()
    assert first.sculptor.memory.rows == {"first": 32}
    trainer(tmp_path, model, sculpted=callback("second", first.sculptor.memory), bf16=True)
    assert set(dtypes) == {torch.bfloat16}


def test_a_memory_that_does_not_fit_is_refused(tmp_path):
    first = callback("first")
    learn(tmp_path, first)
    other = NoLoss()
    with pytest.raises(ValueError, match="of a model with another configuration"):
        trainer(tmp_path, other, sculpted=callback("second", tmp_path))
    with pytest.raises(ValueError, match="of another model or of other targets"):
        trainer(tmp_path, other, sculpted=callback("second", first.sculptor.memory))
    with pytest.raises(FileNotFoundError, match="sculpt_memory"):
        trainer(tmp_path, sculpted=callback("second", tmp_path / "nowhere"))
    with pytest.raises(TypeError, match=r"memory must be .* got dict"):
        callback("second", {})
    with pytest.raises(ValueError, match="independent=True decomposes"):
        callback("second", tmp_path, independent=True)
    with pytest.raises(TypeError, match=r"calibration_rows must be an int; got 2\.5"):
        callback("second", calibration_rows=2.5)
    with pytest.raises(ValueError, match="calibration_rows=0, expected at least 1"):
        callback("second", calibration_rows=0)
