"""The task sequence: same data for both methods, same matrices, plain model before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from tiny_language import SHORT, VERY, tiny_model, tiny_tokenizer

from sculpt.causal import CausalLearner
from sculpt.config import SculptConfig
from sculpt.strategies import STRATEGIES, PlainStrategy, SculptStrategy
from sculpt.text_tasks import Example, Task, batches
from sculpt.training import Progress, Schedule, TrainingError, train_sequence

TASKS = [VERY, SHORT]
CONFIG = SculptConfig(unfreeze_rank_ratio=0.25)


class Recorder(CausalLearner):
    """Keeps the texts of every batch."""

    def __init__(self) -> None:
        super().__init__(tiny_model(), tiny_tokenizer())
        self.seen: list[list[str]] = []

    def loss(self, examples: Sequence[Example], task: Task) -> tuple[torch.Tensor, int]:
        self.seen.append([example.text for example in examples])
        return super().loss(examples, task)


def test_methods_see_the_same_examples_and_train_the_same_matrices() -> None:
    seen, changed = {}, {}
    for method, strategy in STRATEGIES.items():
        learner = Recorder()
        before = {k: v.clone() for k, v in learner.model.state_dict().items()}
        result = train_sequence(
            learner, TASKS, strategy(learner.model, CONFIG), Schedule(3, 2, 1e-3, seed=5)
        )
        after = learner.model.state_dict()
        assert {k: (v.shape, v.dtype) for k, v in after.items()} == {
            k: (v.shape, v.dtype) for k, v in before.items()
        }
        seen[method] = learner.seen
        changed[method] = {k for k in before if not torch.equal(before[k], after[k])}
        assert len(result.losses) == 2
        assert all(len(row) == 3 for row in result.losses)
    assert seen["plain"] == seen["sculpt"]
    assert len(seen["plain"]) == 6
    assert changed["plain"] == changed["sculpt"]
    assert changed["plain"] == {
        f"model.layers.{layer}.{part}_proj.weight"
        for layer in range(2)
        for part in (
            *(f"self_attn.{x}" for x in "qkvo"),
            *(f"mlp.{x}" for x in ("gate", "up", "down")),
        )
    }


def test_data_order_depends_on_the_seed() -> None:
    orders = []
    for seed in (0, 0, 1):
        learner = Recorder()
        strategy = PlainStrategy(learner.model, CONFIG)
        train_sequence(learner, TASKS, strategy, Schedule(4, 1, 1e-3, seed=seed))
        orders.append(learner.seen)
    assert orders[0] == orders[1] != orders[2]


def test_result_has_a_lower_triangle_and_a_certificate_for_each_task() -> None:
    learner = CausalLearner(tiny_model(), tiny_tokenizer())
    events: list[Progress] = []
    strategy = SculptStrategy(learner.model, CONFIG)
    result = train_sequence(learner, TASKS, strategy, Schedule(3, 2, 1e-2), events.append)
    for values in (result.generated, result.among_labels):
        assert [[math.isnan(value) for value in row] for row in values] == [
            [False, True],
            [False, False],
        ]
    assert result.generated[1][0] == learner.score(VERY).generated
    assert len(result.certificates) == 2
    assert all(certificate.ok for certificate in result.certificates)
    assert result.worst_leak is not None
    assert result.worst_leak.leak <= result.worst_leak.limit
    # Two moments and a step count for each matrix of the 14: t = 8 of 32, 4 of 16 for keys, values.
    assert result.trainable_elements == 2 * (5 * 8**2 + 2 * 4**2)
    assert result.optimizer_state_bytes == 4 * (2 * result.trainable_elements + 14)
    assert [(e.phase, e.done, e.total) for e in events if e.task == "very" and e.phase == "train"]
    assert {e.phase for e in events} == {"subspaces", "train", "certify", "evaluate"}
    assert result.step_seconds > 0
    assert set(result.seconds) == {"subspaces", "train", "certify", "evaluate"}


def test_plain_holds_no_gradient_or_moment_after_a_task() -> None:
    learner = CausalLearner(tiny_model(), tiny_tokenizer())
    strategy = PlainStrategy(learner.model, CONFIG)
    result = train_sequence(learner, TASKS, strategy, Schedule(1, 2, 1e-3))
    assert all(p.grad is None and not p.requires_grad for p in learner.model.parameters())
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    assert result.trainable_elements == weights
    assert result.optimizer_state_bytes == 4 * (2 * weights + 14)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    learner = CausalLearner(tiny_model(), tiny_tokenizer())
    with torch.no_grad():
        learner.model.model.norm.weight.fill_(math.nan)
    strategy = PlainStrategy(learner.model, CONFIG)
    with pytest.raises(TrainingError, match=r"step 1 of 'very'.*lr below 0\.001"):
        train_sequence(learner, TASKS, strategy, Schedule(3, 2, 1e-3))


def test_warm_up_rises_to_the_full_rate() -> None:
    schedule = Schedule(5, 1, 1e-3, warmup_steps=3)
    assert [schedule.factor(step) for step in range(1, 6)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert Schedule(5, 1, 1e-3).factor(1) == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"lr": 0.0}, r"lr=0\.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"warmup_steps": 9}, "warmup_steps=9"),
    ],
)
def test_schedule_refuses_what_cannot_be(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**({"steps": 3, "batch_size": 2, "lr": 1e-3} | values))


def test_batches_use_every_example_before_any_twice() -> None:
    examples = [Example(str(index), "a") for index in range(7)]
    stream = batches(examples, 3, torch.Generator().manual_seed(0))
    drawn = [example.text for _ in range(7) for example in next(stream)]
    for start in range(0, 21, 7):
        assert sorted(drawn[start : start + 7]) == sorted(e.text for e in examples)
    with pytest.raises(ValueError, match="batch_size=0"):
        next(batches(examples, 0, torch.Generator()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ("a",)}, "two or more"),
        ({"labels": ("a", "a")}, "two or more"),
        ({"labels": ("a", " ")}, "empty label"),
        ({"train": ()}, "train is empty"),
        ({"test": (Example("x", "c"),)}, r"test has labels \['c'\]"),
    ],
)
def test_task_refuses_what_cannot_be(change: dict, message: str) -> None:
    one = (Example("x", "a"),)
    values = {"name": "n", "suffix": ":", "labels": ("a", "b"), "train": one, "test": one}
    with pytest.raises(ValueError, match=message):
        Task(**(values | change))
