"""Encoder learner with one head for all tasks, on a tiny random encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_language import SHORT, VERY, WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from sculpt.encoder import EncoderLearner
from sculpt.text_tasks import Task

TASKS = [VERY, SHORT]


@pytest.fixture
def learner() -> EncoderLearner:
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.3,
    )
    return EncoderLearner(BertModel(config, add_pooling_layer=False).eval(), fast, TASKS)


def test_head_holds_the_embeddings_of_all_labels(learner: EncoderLearner) -> None:
    assert learner.head.shape == (5, 32)
    assert not learner.head.requires_grad
    torch.testing.assert_close(learner.head.norm(dim=1), torch.ones(5))
    with torch.no_grad():
        ids = [1, *learner._ids(SHORT.suffix + " tech"), 2]
        hidden = learner.model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
    torch.testing.assert_close(learner.head[4], hidden / hidden.norm())


def test_loss_is_over_the_labels_of_all_tasks(learner: EncoderLearner) -> None:
    with torch.no_grad():
        loss, tokens = learner.loss(SHORT.train, SHORT)
        rows = []
        for example in SHORT.train:
            one = learner._embed([learner.prompt_ids(example.text, SHORT)])[0][0]
            rows.append((20 * learner.head @ one).log_softmax(dim=0))
    gold = [3 + SHORT.labels.index(example.label) for example in SHORT.train]
    expected = -sum(row[index] for row, index in zip(rows, gold, strict=True)) / len(rows)
    torch.testing.assert_close(loss, expected)
    lengths = [len(learner.prompt_ids(e.text, SHORT)) + 2 for e in SHORT.train]
    assert len(set(lengths)) > 1
    assert tokens == sum(lengths)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_score_tells_all_labels_from_own_labels(learner: EncoderLearner, task: Task) -> None:
    all_labels = own_labels = 0
    own = [learner.labels.index(label) for label in task.labels]
    for example in task.test:
        with torch.no_grad():
            one = learner._embed([learner.prompt_ids(example.text, task)])[0][0]
        logits = learner.head @ one
        all_labels += learner.labels[int(logits.argmax())] == example.label
        own_labels += task.labels[int(logits[own].argmax())] == example.label
    score = learner.score(task, batch_size=2)
    assert score.generated == all_labels / len(task.test)
    assert score.among_labels == own_labels / len(task.test)


def test_a_long_text_never_pushes_out_the_suffix(learner: EncoderLearner) -> None:
    learner.max_text_tokens = 2
    ids = learner.prompt_ids("the film is very good and long", VERY)
    assert learner.tokenizer.decode(ids) == "the film Verdict :"


def test_tasks_must_not_share_labels(learner: EncoderLearner) -> None:
    with pytest.raises(ValueError, match="no label in two tasks"):
        EncoderLearner(learner.model, learner.tokenizer, [VERY, VERY])


def test_saved_directory_is_plain(learner: EncoderLearner, tmp_path: Path) -> None:
    learner.save(tmp_path)
    again = EncoderLearner.from_directory(tmp_path, TASKS)
    assert again.score(VERY) == learner.score(VERY)
    assert {k: v.shape for k, v in again.model.state_dict().items()} == {
        k: v.shape for k, v in learner.model.state_dict().items()
    }
