"""Causal learner: losses and answers against a model that sees one row at a time, unpadded."""

from __future__ import annotations

import pytest
import torch
from tiny_language import SHORT, VERY, tiny_model, tiny_tokenizer

from sculpt.causal import CausalLearner
from sculpt.text_tasks import Example, Task


@pytest.fixture
def learner() -> CausalLearner:
    return CausalLearner(tiny_model(), tiny_tokenizer())


def log_probabilities(learner: CausalLearner, text: str, label: str, task: Task) -> torch.Tensor:
    """Of each answer token, from one plain forward pass over the whole unpadded row."""
    prompt, answer = learner.prompt_ids(text, task), learner.answer_ids(label)
    logits = learner.model(torch.tensor([prompt + answer])).logits[0]
    rows = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
    return rows[torch.arange(len(answer)), torch.tensor(answer)]


def test_loss_is_the_mean_over_answer_tokens_and_terminators(learner: CausalLearner) -> None:
    with torch.no_grad():
        loss, tokens = learner.loss(VERY.train, VERY)
        each = [log_probabilities(learner, e.text, e.label, VERY) for e in VERY.train]
    assert len({len(row) for row in each}) > 1, "answers of one length would hide misalignment"
    torch.testing.assert_close(loss, -torch.cat(each).mean())
    rows = [learner.prompt_ids(e.text, VERY) + learner.answer_ids(e.label) for e in VERY.train]
    assert tokens == sum(len(row) - 1 for row in rows)


def test_padding_is_masked_by_length_not_by_id(learner: CausalLearner) -> None:
    # The padding token ends every answer too.
    assert learner.tokenizer.pad_token_id == learner.tokenizer.eos_token_id
    alone, _ = learner.loss([Example("it is", "quite")], VERY)
    rows = learner.prompt_ids("it is", VERY), learner.answer_ids("quite")
    assert rows[1][-1] == learner.tokenizer.eos_token_id
    expected = -log_probabilities(learner, "it is", "quite", VERY).mean()
    torch.testing.assert_close(alone, expected)


@pytest.mark.parametrize("task", [VERY, SHORT], ids=lambda task: task.name)
@pytest.mark.parametrize("batch_size", [1, 2, 24])
def test_labels_are_scored_over_their_full_text(
    learner: CausalLearner, task: Task, batch_size: int
) -> None:
    with torch.no_grad():
        for start in range(0, len(task.test), batch_size):
            batch = task.test[start : start + batch_size]
            scores, _ = learner._score_labels(batch, task)
            for row, example in enumerate(batch):
                for column, label in enumerate(task.labels):
                    whole = log_probabilities(learner, example.text, label, task).sum()
                    torch.testing.assert_close(scores[row, column], whole)


def test_generated_is_what_generate_writes() -> None:
    tokenizer = tiny_tokenizer()
    agreed = set()
    for seed in range(4):
        learner = CausalLearner(tiny_model(seed), tokenizer)
        # Train a little, so that some answers are right and others are not.
        optimizer = torch.optim.AdamW(learner.model.parameters(), lr=2e-2)
        for _ in range(12):
            loss, _ = learner.loss(VERY.train, VERY)
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            _, greedy = learner._score_labels(VERY.test, VERY)
        for row, example in enumerate(VERY.test):
            prompt = learner.prompt_ids(example.text, VERY)
            written = learner.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=4,
            )[0, len(prompt) :].tolist()
            for column, label in enumerate(VERY.labels):
                answer = learner.answer_ids(label)
                assert bool(greedy[row, column]) == (written[: len(answer)] == answer)
                agreed.add(bool(greedy[row, column]))
    assert agreed == {True, False}


def test_score_counts_and_restores_the_mode(learner: CausalLearner) -> None:
    learner.model.train()
    score = learner.score(VERY, batch_size=2)
    assert learner.model.training
    with torch.no_grad():
        best = [
            max(
                VERY.labels,
                key=lambda label, text=e.text: float(
                    log_probabilities(learner, text, label, VERY).sum()
                ),
            )
            for e in VERY.test
        ]
    right = sum(label == e.label for label, e in zip(best, VERY.test, strict=True))
    assert score.among_labels == right / len(VERY.test)
    assert 0.0 <= score.generated <= score.among_labels


def test_a_long_text_never_pushes_out_the_suffix() -> None:
    learner = CausalLearner(tiny_model(), tiny_tokenizer(), max_text_tokens=3)
    ids = learner.prompt_ids("the film is very good and long", VERY)
    assert learner.tokenizer.decode(ids) == "the film is Verdict :"


def test_bad_arguments_name_themselves() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="max_text_tokens=0"):
        CausalLearner(tiny_model(), tokenizer, max_text_tokens=0)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token_id"):
        CausalLearner(tiny_model(), tokenizer)


def test_a_directory_that_holds_no_model_is_an_error(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        CausalLearner.from_directory(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="causal language model"):
        CausalLearner.from_directory(tmp_path)


def test_saved_directory_is_plain(learner: CausalLearner, tmp_path) -> None:
    learner.save(tmp_path)
    again = CausalLearner.from_directory(tmp_path)
    for name, value in learner.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert again.prompt_ids("the film", VERY) == learner.prompt_ids("the film", VERY)
