"""Encoder-decoders: losses and scores against a model that sees one row at a time, unpadded."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import END, VERY, WORDS, tiny_tokenizer
from tiny_runs import whole_and_resumed
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from sculpt import SculptConfig, Sculptor
from sculpt.data.examples import DataError, Example, Message, Task
from sculpt.models.encoding import Encoded
from sculpt.models.seq2seq import Seq2SeqLearner
from sculpt.runs.sculpting import Summed


def tokenizer() -> Any:
    """An end token after each text, as T5 has it."""
    return tiny_tokenizer(f"$A {END}")


def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(WORDS) + 2, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        pad_token_id=0, eos_token_id=0, decoder_start_token_id=1, initializer_factor=2.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def bart() -> Any:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(WORDS) + 2, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=0, forced_eos_token_id=None, decoder_start_token_id=1, init_std=0.3,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


@pytest.fixture(params=[t5, bart], ids=["t5", "bart"])
def learner(request: pytest.FixtureRequest) -> Seq2SeqLearner:
    return Seq2SeqLearner(request.param(), tokenizer(), max_new_tokens=4)


def log_probabilities(learner: Seq2SeqLearner, example: Example, label: str) -> torch.Tensor:
    """Of each answer token, from one plain pass."""
    ids = learner.tokenizer(example.prompt)["input_ids"]
    answer = learner.tokenizer(label)["input_ids"]
    logits = learner.model(
        input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[1, *answer[:-1]]])
    ).logits[0]
    return logits.log_softmax(dim=-1)[torch.arange(len(answer)), torch.tensor(answer)]


def test_loss_is_the_mean_over_answer_tokens(learner: Seq2SeqLearner) -> None:
    with torch.no_grad():
        loss, tokens = learner.loss([learner.encode(example) for example in VERY.train])
        each = [log_probabilities(learner, e, e.answer) for e in VERY.train]
    assert len({len(row) for row in each}) > 1
    torch.testing.assert_close(loss, -torch.cat(each).mean())
    prompts = sum(len(learner.tokenizer(e.prompt)["input_ids"]) for e in VERY.train)
    assert tokens == prompts + sum(len(row) for row in each)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_labels_are_ranked_and_written(learner: Seq2SeqLearner, batch_size: int) -> None:
    learner.score_batch = batch_size
    right = exact = 0
    with torch.no_grad():
        for example in VERY.test:
            scores = [float(log_probabilities(learner, example, x).sum()) for x in VERY.labels]
            right += VERY.labels[max(range(3), key=scores.__getitem__)] == example.answer
            ids = learner.tokenizer(example.prompt, return_tensors="pt")["input_ids"]
            written = learner.model.generate(ids, max_new_tokens=4, do_sample=False)[0, 1:].tolist()
            answer = learner.tokenizer(example.answer)["input_ids"]
            exact += written[: len(answer)] == answer
    learner.model.train()
    score = learner.score(VERY)
    assert learner.model.training
    assert score.among_labels == right / len(VERY.test)
    assert score.generated == exact / len(VERY.test)
    free = Task("free", VERY.train, VERY.test)
    assert learner.score(free).generated == exact / len(VERY.test)
    assert math.isnan(learner.score(free).among_labels)


def test_documents_and_chats_are_refused(learner: Seq2SeqLearner) -> None:
    with pytest.raises(DataError, match="f:1: a document needs a causal language model"):
        learner.encode(Example(answer="the film", where="f:1"))
    messages = (Message("user", "good"), Message("assistant", "quite"))
    with pytest.raises(DataError, match="f:2: a chat needs a causal language model"):
        learner.encode(Example(messages=messages, where="f:2"))


@pytest.mark.parametrize("method", ["plain", "sculpt"])
def test_a_run_of_an_encoder_decoder_is_resumed_to_the_same_bits(
    tmp_path: Path, method: str
) -> None:
    learner = Seq2SeqLearner(t5(), tokenizer())
    learner.save(tmp_path / "t5")
    whole, resumed = whole_and_resumed(tmp_path / "t5", method, 6)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = learner.model.state_dict()
    changed = {name for name in whole if not torch.equal(whole[name], start[name])}
    assert any("SelfAttention" in name for name in changed)
    assert any("EncDecAttention" in name for name in changed)
    assert not any("shared" in name or "norm" in name for name in changed)


def test_what_is_protected_of_rows_has_no_padding(learner: Seq2SeqLearner) -> None:
    # Of both as many columns, and padding in other rows.
    rows = [Encoded((2, 3, 4, 0), (5, 3, 0)), Encoded((3, 0), (4, 5, 2, 0))]
    sculptor = Sculptor(learner.model, SculptConfig())
    sculptor.protect([Summed(learner, rows)], "both")
    of_encoder = re.compile(r".*\bencoder\..*|.*(EncDecAttention|encoder_attn)[.](k|v).*")
    for name, sides in sculptor.memory.sides.items():
        expected = 6 if of_encoder.fullmatch(name) else 7
        assert int(sculptor.memory.factors[sides.left].count) == expected, name
    assert sculptor.memory.rows == {"both": 2}
    alone = Sculptor(learner.model, SculptConfig())
    alone.protect([Summed(learner, rows[:1]), Summed(learner, rows[1:])])
    for key, factor in alone.memory.factors.items():
        assert torch.allclose(
            factor.total, sculptor.memory.factors[key].total, rtol=1e-3, atol=1e-5
        )
