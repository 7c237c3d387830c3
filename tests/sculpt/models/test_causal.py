"""Causal learner: losses and answers against a model that sees one row at a time, unpadded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_language import SHORT, VERY, tiny_model, tiny_tokenizer

from sculpt.data.examples import Example, Task
from sculpt.models.causal import CausalLearner
from sculpt.models.encoding import IGNORED, Encoded
from sculpt.models.scoring import measures

DOCUMENTS = Task(
    "documents",
    train=[Example(answer="the film is good and the song is bad")],
    test=[Example(answer="the news is about money"), Example(answer="a long song")],
)


@pytest.fixture
def learner() -> CausalLearner:
    return CausalLearner(tiny_model(), tiny_tokenizer())


def row_loss(learner: CausalLearner, row: Encoded) -> torch.Tensor:
    """Log-probability of each learned token, from one plain forward pass over the whole row."""
    logits = learner.model(torch.tensor([row.ids])).logits[0].log_softmax(dim=-1)
    places = [place for place, label in enumerate(row.labels) if label != IGNORED]
    return torch.stack([logits[place - 1, row.labels[place]] for place in places])


def label_score(learner: CausalLearner, example: Example, label: str) -> torch.Tensor:
    return row_loss(learner, learner.encode(Example(example.text, label, example.suffix))).sum()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("task", [VERY, DOCUMENTS], ids=lambda task: task.name)
def test_loss_is_the_mean_over_learned_tokens(packing: bool, task: Task) -> None:
    learner = CausalLearner(tiny_model(), tiny_tokenizer(), packing=packing)
    rows = [learner.encode(example) for example in (*task.train, *task.test)]
    assert len({row.learned for row in rows}) > 1, "answers of one length would hide misalignment"
    with torch.no_grad():
        loss, tokens = learner.loss(rows)
        expected = -torch.cat([row_loss(learner, row) for row in rows]).mean()
    torch.testing.assert_close(loss, expected)
    assert tokens == sum(len(row.ids) - 1 for row in rows)


def test_packing_is_refused_where_rows_would_see_each_other() -> None:
    class Leaky(torch.nn.Module):
        """Forwards without telling where rows begin."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model()

        def forward(self, position_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
            return self.inner(**inputs)

    with pytest.raises(ValueError, match=r"Leaky packed rows see each other"):
        CausalLearner(Leaky(), tiny_tokenizer(), packing=True)


def test_padding_is_masked_by_length_not_by_id(learner: CausalLearner) -> None:
    # The padding token ends every answer too.
    assert learner.tokenizer.pad_token_id == learner.tokenizer.eos_token_id
    row = learner.encode(VERY.train[2])
    assert row.ids[-1] == row.labels[-1] == learner.tokenizer.eos_token_id
    loss, _ = learner.loss([row])
    torch.testing.assert_close(loss, -row_loss(learner, row).mean())


@pytest.mark.parametrize("task", [VERY, SHORT], ids=lambda task: task.name)
@pytest.mark.parametrize("batch_size", [1, 2, 24])
def test_labels_are_scored_over_their_full_text(
    learner: CausalLearner, task: Task, batch_size: int
) -> None:
    with torch.no_grad():
        for start in range(0, len(task.test), batch_size):
            batch = [(learner._question(e), e) for e in task.test[start : start + batch_size]]
            scores, _ = learner._rank(batch, task.labels)
            for row, (_, example) in enumerate(batch):
                for column, label in enumerate(task.labels):
                    expected = label_score(learner, example, label)
                    torch.testing.assert_close(scores[row, column], expected)


def trained(seed: int) -> CausalLearner:
    """Trained a little, so that some answers are right and others are not."""
    learner = CausalLearner(tiny_model(seed), tiny_tokenizer(), max_new_tokens=4)
    optimizer = torch.optim.AdamW(learner.model.parameters(), lr=2e-2)
    for _ in range(12):
        loss, _ = learner.loss([learner.encode(example) for example in VERY.train])
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return learner


def test_generated_is_what_generate_writes() -> None:
    agreed = set()
    for seed in range(4):
        learner = trained(seed)
        batch = [(learner._question(example), example) for example in VERY.test]
        with torch.no_grad():
            _, greedy = learner._rank(batch, VERY.labels)
            written = learner._write([question for question, _ in batch])
        for row, example in enumerate(VERY.test):
            for column, label in enumerate(VERY.labels):
                answer = list(learner._answer(example, label))
                assert bool(greedy[row, column]) == (written[row][: len(answer)] == answer)
                agreed.add(bool(greedy[row, column]))
        # The same through texts, for a task whose answers have to be written.
        free = Task("free", VERY.train, VERY.test)
        assert learner.score(free).generated == learner.score(VERY).generated
    assert agreed == {True, False}


def test_free_answers_are_scored_by_the_measure_of_the_task() -> None:
    learner = trained(0)
    task = Task("free", VERY.train, VERY.test, VERY.labels, measure="choice")
    score = learner.score(task)
    written = [
        learner._text(row) for row in learner._write([learner._question(e) for e in VERY.test])
    ]
    expected = measures(written, [e.answer for e in VERY.test], VERY.labels)
    assert score.more == expected
    assert score.generated == expected["choice"]
    assert score.among_labels == learner.score(VERY).among_labels


def test_documents_are_scored_by_the_next_token(learner: CausalLearner) -> None:
    right = total = 0
    for example in DOCUMENTS.test:
        ids = learner.encode(example).ids
        best = learner.model(torch.tensor([ids])).logits[0].argmax(dim=-1).tolist()
        right += sum(a == b for a, b in zip(best, ids[1:], strict=False))
        total += len(ids) - 1
    score = learner.score(DOCUMENTS)
    assert score.generated == score.more["next_token"] == right / total


def test_bad_arguments_name_themselves() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="max_text_tokens=0"):
        CausalLearner(tiny_model(), tokenizer, max_text_tokens=0)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token_id"):
        CausalLearner(tiny_model(), tokenizer)


def test_a_directory_that_holds_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        CausalLearner.from_directory(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="AutoModelForCausalLM cannot read it"):
        CausalLearner.from_directory(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer can be read there"):
        CausalLearner.from_directory(tmp_path)
