"""Encoder learner with one head for all tasks, on a tiny random encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_language import END, SHORT, UNKNOWN, VERY, WORDS, tiny_tokenizer
from transformers import BertConfig, BertModel

from sculpt.models.classifying import NearestLabelLearner

TASKS = [VERY, SHORT]


@pytest.fixture
def learner() -> NearestLabelLearner:
    tokenizer = tiny_tokenizer(f"{UNKNOWN} $A {END}")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 2, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, initializer_range=0.3,
    )  # fmt: skip
    return NearestLabelLearner(BertModel(config, add_pooling_layer=False).eval(), tokenizer, TASKS)


def embedding(learner: NearestLabelLearner, ids: tuple[int, ...]) -> torch.Tensor:
    """Of one row without padding."""
    hidden = learner.model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
    return hidden / hidden.norm()


def test_head_holds_the_embeddings_of_all_labels(learner: NearestLabelLearner) -> None:
    assert learner.head.shape == (5, 32)
    assert not learner.head.requires_grad
    with torch.no_grad():
        ids = (1, *learner.encoder.plain(" Topic : tech"), 0)
        torch.testing.assert_close(learner.head[4], embedding(learner, ids))


def test_loss_is_over_the_labels_of_all_tasks(learner: NearestLabelLearner) -> None:
    encoded = [learner.encode(example) for example in SHORT.train]
    with torch.no_grad():
        loss, tokens = learner.loss(encoded)
        rows = [(20 * learner.head @ embedding(learner, e.ids)).log_softmax(0) for e in encoded]
    gold = [3 + SHORT.labels.index(example.answer) for example in SHORT.train]
    expected = -sum(row[index] for row, index in zip(rows, gold, strict=True)) / len(rows)
    torch.testing.assert_close(loss, expected)
    lengths = [len(row.ids) for row in encoded]
    assert len(set(lengths)) > 1
    assert tokens == sum(lengths)


def test_a_shared_label_is_one_label_and_asked_for_in_the_same_words(
    learner: NearestLabelLearner,
) -> None:
    again = NearestLabelLearner(learner.model, learner.tokenizer, [VERY, VERY])
    assert again.labels == list(VERY.labels)
    assert again.head.shape[0] == len(VERY.labels)
    other = replace(VERY, train=[replace(e, suffix=" Answer :") for e in VERY.train])
    with pytest.raises(ValueError, match=r"asked for by ' Answer : very good', and by ' Verdict :"):
        NearestLabelLearner(learner.model, learner.tokenizer, [VERY, other])


def test_saved_directory_is_plain(learner: NearestLabelLearner, tmp_path: Path) -> None:
    learner.save(tmp_path)
    again = NearestLabelLearner.from_directory(tmp_path, TASKS)
    assert again.score(VERY) == learner.score(VERY)
    assert {k: v.shape for k, v in again.model.state_dict().items()} == {
        k: v.shape for k, v in learner.model.state_dict().items()
    }
