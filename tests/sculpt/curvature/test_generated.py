"""Text that a model writes by itself: its own distribution, cut where rows end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sculpt import SculptConfig, Sculptor
from sculpt.curvature.generated import share_of_distinct, written_by
from tests.sculpt.small_models import KINDS

TOKENIZER = SimpleNamespace(bos_token_id=1, eos_token_id=2)


@pytest.fixture
def model() -> nn.Module:
    return KINDS["linear"].build()


def test_rows_begin_end_and_are_learned_where_they_are_text(model):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    batches = written_by(model, TOKENIZER, 300, 31, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    written, ended = 0, 0
    for batch in batches:
        for ids, mask, labels in zip(*batch.values(), strict=True):
            row = ids[mask.bool()].tolist()
            assert row[0] == 1
            assert 2 not in row[1:-1]
            assert len(row) == 32 or row[-1] == 2
            assert torch.equal(mask, mask.sort(descending=True).values)
            assert labels.tolist() == row + [-100] * (len(ids) - len(row))
            written, ended = written + len(row) - 1, ended + (len(row) < len(ids))
    assert ended > 0
    assert written >= 300
    assert written - 300 < 8 * 31
    again = written_by(model, TOKENIZER, 300, 31, seed=0)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True)
    )
    other = written_by(model, TOKENIZER, 300, 31, seed=1)
    assert not torch.equal(batches[0]["input_ids"], other[0]["input_ids"])


def test_it_is_drawn_from_the_distribution_of_the_model(model):
    """Whatever its own settings for generation are."""
    with torch.no_grad():
        model.lm_head.weight *= 40
        after = model(torch.arange(40)[:, None]).logits[:, -1].softmax(-1)
    # The token that follows itself most often, which a penalty of repetition would show.
    begin = int(after.diagonal().argmax())
    expected = after[begin]
    assert expected[begin] > 0.1
    model.generation_config.update(temperature=0.1, top_k=2, repetition_penalty=9.0, min_p=0.5)
    tokenizer = SimpleNamespace(bos_token_id=begin, eos_token_id=2)
    batches = written_by(model, tokenizer, 4000, 1, seed=0)
    drawn = torch.cat([batch["input_ids"][:, 1] for batch in batches])
    assert len(drawn) == 4000
    counts = drawn.bincount(minlength=40)
    spread = (4000 * expected * (1 - expected)).sqrt()
    # Of 40 numbers none is 5 standard deviations away.
    assert ((counts - 4000 * expected).abs() <= 5 * spread + 1).all()
    assert (expected > 0.05).sum() > 2


def test_text_that_repeats_itself_is_warned_of(model):
    batch = {"input_ids": torch.tensor([[1, 3, 3, 3, 3, 3, 3]])}
    batch["attention_mask"] = torch.ones(1, 7, dtype=torch.int64)
    assert share_of_distinct([batch]) == 2 / 4  # 1333 and 3333, three times.
    batch["attention_mask"][:, 3:] = 0
    assert share_of_distinct([batch]) == 1.0
    sculptor = Sculptor(model, SculptConfig())
    with torch.no_grad():
        model.lm_head.weight *= 1e4
    with pytest.warns(UserWarning, match=r"repeats itself: \d+% of its runs of 4"):
        sculptor.protect_generated(TOKENIZER, 300, length=30)
    assert sculptor.memory.rows == {"generated": 16}


def test_what_it_writes_is_protected_as_rows_are(model):
    sculptor, other = (Sculptor(model, SculptConfig()) for _ in range(2))
    sculptor.protect_generated(TOKENIZER, 100, length=20, seed=3)
    other.protect(written_by(model, TOKENIZER, 100, 20, seed=3))
    for key, factor in other.memory.factors.items():
        assert torch.equal(factor.total, sculptor.memory.factors[key].total)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokens": 0}, "tokens must be an int of at least 1; got 0"),
        ({"tokens": True}, "tokens must be an int of at least 1; got True"),
        ({"length": 1.5}, "length must be an int of at least 1; got 1.5"),
        ({"length": 32}, "length=32 and a token to begin with are more than the 32 positions"),
        ({"tokenizer": SimpleNamespace(bos_token_id=None, eos_token_id=None)}, "no beginning-of"),
    ],
)
def test_arguments_that_do_not_fit(model, changes, match):
    values = {"tokenizer": TOKENIZER, "tokens": 100, "length": 20} | changes
    sculptor = Sculptor(model, SculptConfig())
    with pytest.raises(ValueError, match=match):
        sculptor.protect_generated(**values)
    assert not sculptor.memory


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_models_that_do_not_write(kind):
    sculptor = Sculptor(KINDS[kind].build(), SculptConfig())
    with pytest.raises(TypeError, match="protect_generated needs a causal language model; got"):
        sculptor.protect_generated(TOKENIZER)
