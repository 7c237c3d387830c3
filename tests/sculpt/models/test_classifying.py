"""Classification heads: shared by all tasks, trained by every method, never sculpted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import SHORT, VERY, WORDS, tiny_model, tiny_tokenizer
from tiny_runs import whole_and_resumed
from transformers import BertConfig, BertForSequenceClassification, LlamaForSequenceClassification

from sculpt.config import SculptConfig
from sculpt.data.examples import DataError, Example, Task
from sculpt.models.classifying import ClassificationLearner
from sculpt.models.load import kind_of
from sculpt.task.targets import find_targets

TASKS = [VERY, SHORT]


def bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 2, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, initializer_range=0.3, num_labels=2,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def llama() -> Any:
    config = tiny_model().config
    config.num_labels = 2
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


@pytest.fixture(params=[bert, llama], ids=["bert", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    request.param().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_new_head_answers_with_the_labels_of_all_tasks(folder: Path) -> None:
    assert kind_of(folder) == "classification"
    learner = ClassificationLearner.from_directory(folder, TASKS)
    assert learner.labels == [*VERY.labels, *SHORT.labels]
    rows = [learner.encode(example) for example in SHORT.train]
    with torch.no_grad():
        loss, tokens = learner.loss(rows)
        # One row at a time, unpadded.
        logits = torch.cat([learner.model(torch.tensor([row.ids])).logits for row in rows])
        tests = torch.cat(
            [learner.model(torch.tensor([learner.encode(e).ids])).logits for e in VERY.test]
        )
    gold = torch.tensor([learner.labels.index(example.answer) for example in SHORT.train])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, gold))
    assert tokens == sum(len(row.ids) for row in rows)
    gold = torch.tensor([learner.labels.index(example.answer) for example in VERY.test])
    learner.score_batch = 2
    score = learner.score(VERY)
    assert score.generated == float((tests.argmax(dim=1) == gold).double().mean())
    assert score.among_labels == float((tests[:, :3].argmax(dim=1) == gold).double().mean())


def test_the_head_is_no_target(folder: Path) -> None:
    learner = ClassificationLearner.from_directory(folder, TASKS)
    found = find_targets(learner.model, SculptConfig())
    head = {
        name
        for name, p in learner.model.named_parameters()
        if any(p is q for q in learner.free_parameters())
    }
    assert head
    assert head <= found.left_out.keys()
    weights = [
        reason for name, reason in found.left_out.items() if name in head and "weight" in name
    ]
    assert set(weights) == {"classification head"}


@pytest.mark.parametrize("method", ["plain", "sculpt"])
def test_a_run_trains_the_head_and_is_resumed_to_the_same_bits(folder: Path, method: str) -> None:
    whole, resumed = whole_and_resumed(folder, method, 6)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    torch.manual_seed(0)
    start = ClassificationLearner.from_directory(folder, TASKS).model.state_dict()
    changed = {name for name in whole if not torch.equal(whole[name], start[name])}
    assert any(name.startswith(("classifier", "score")) for name in changed)
    assert any("layer" in name for name in changed)
    assert not any("embed" in name or "norm" in name.lower() for name in changed)


def test_tasks_need_labels_and_rows_a_question(folder: Path) -> None:
    with pytest.raises(DataError, match="'free' has no labels"):
        ClassificationLearner.from_directory(folder, [Task("free", VERY.train, VERY.test)])
    learner = ClassificationLearner.from_directory(folder, TASKS)
    with pytest.raises(DataError, match="f:1: a document needs a causal language model"):
        learner.encode(Example(answer="the film", where="f:1"))
