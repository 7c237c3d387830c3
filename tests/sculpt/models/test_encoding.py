"""Rows as tokens: what is learned, token by token, and what a row that is too long loses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_language import END, tiny_tokenizer

from sculpt.data.examples import DataError, Example, Message
from sculpt.models.encoding import IGNORED, Encoded, Encoder, passages_of

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def chat_tokenizer(template: str = TEMPLATE) -> Any:
    tokenizer = tiny_tokenizer()
    marks = ["<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = template
    return tokenizer


def shown(tokenizer: Any, row: Encoded) -> list[tuple[str, bool]]:
    """Each token with whether it is learned."""
    tokens = tokenizer.convert_ids_to_tokens(list(row.ids))
    for token, label in zip(row.ids, row.labels, strict=True):
        assert label in (IGNORED, token)
    return [(t, label != IGNORED) for t, label in zip(tokens, row.labels, strict=True)]


def words(text: str, learned: bool) -> list[tuple[str, bool]]:
    return [(word, learned) for word in text.split()]


def test_an_answer_and_its_end_are_learned_and_nothing_else() -> None:
    tokenizer = tiny_tokenizer()
    row = Encoder(tokenizer).causal(Example("the film is good", "very good", "\nVerdict :"))
    assert shown(tokenizer, row) == (
        words("the film is good Verdict :", False) + words(f"very good {END}", True)
    )
    assert row.learned == 3
    row = Encoder(tokenizer).causal(Example(answer="the film is good"))
    assert shown(tokenizer, row) == words("the", False) + words(f"film is good {END}", True)
    with pytest.raises(ValueError, match="expected a fast tokenizer"):
        Encoder(object())


def test_a_long_document_is_cut_into_pieces_and_loses_nothing() -> None:
    tokenizer = tiny_tokenizer()
    text = "the film is good and the song is very bad they say"
    whole = (*Encoder(tokenizer).plain(text), tokenizer.eos_token_id)
    for size in (2, 4, 5, 12, 50):
        rows = Encoder(tokenizer, max_tokens=size).document(Example(answer=text))
        # A last piece of one token would have nothing to learn.
        joined = tuple(token for row in rows for token in row.ids)
        assert joined == whole[: len(joined)]
        assert len(whole) - len(joined) <= (len(whole) % size == 1)
        assert all(len(row.ids) <= size for row in rows)
        assert all(row.labels == (IGNORED, *row.ids[1:]) for row in rows)


def test_only_what_the_assistant_says_is_learned_token_by_token() -> None:
    tokenizer = chat_tokenizer()
    messages = (
        Message("system", "they say that"),
        Message("user", "is the film good"),
        Message("assistant", "very good"),
        Message("user", "and the song"),
        Message("assistant", "quite bad"),
    )
    encoder = Encoder(tokenizer)
    row = encoder.causal(Example(messages=messages))
    assert shown(tokenizer, row) == [
        *words(f"<|system|> they say that {END}", False),
        *words(f"<|user|> is the film good {END} <|assistant|>", False),
        *words(f"very good {END}", True),
        *words(f"<|user|> and the song {END} <|assistant|>", False),
        *words(f"quite bad {END}", True),
    ]
    # The tokens are those that the template itself gives.
    turns = [{"role": m.role, "content": m.content} for m in messages]
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert list(row.ids) == whole[: len(row.ids)]
    question = encoder.question(Example(messages=messages))
    assert question.ids == row.ids[:-3]
    assert (
        encoder.answer(Example(messages=messages), "very good")
        == row.ids[row.answer_start : row.answer_start + 3]
    )


def test_what_follows_the_end_of_an_answer_is_not_learned() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["\n"])
    turns = (Message("user", "film"), Message("assistant", "good"))
    row = Encoder(tokenizer).causal(Example(messages=turns * 2))
    question = [("<|user|>", False), ("film", False), (END, False), ("\n", False)]
    answer = [("<|assistant|>", False), ("good", True), (END, True)]
    assert shown(tokenizer, row) == [*question, *answer, ("\n", False), *question, *answer]


def test_a_template_that_rewrites_earlier_answers_is_refused() -> None:
    forgetful = (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}"
        "{{ '<|' + m['role'] + '|> ' + m['content'] + ' <end>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
    )
    turns = [Message("user", "film"), Message("assistant", "good")] * 2
    with pytest.raises(DataError, match=r"f:3: the chat template writes message 2 differently"):
        Encoder(chat_tokenizer(forgetful)).causal(Example(messages=tuple(turns), where="f:3"))
    with pytest.raises(DataError, match="f:3: the tokenizer has no chat template"):
        Encoder(tiny_tokenizer()).causal(Example(messages=tuple(turns), where="f:3"))


LONG = Example(
    "is this good or bad ?\nfilm: the film is very good and long and\nthey say that it is\n"
    "Topic: this is it",
    "very good",
    "\nVerdict :",
)


@pytest.mark.parametrize("limit", [{"max_tokens": 22}, {"max_text_tokens": 6}])
def test_a_long_row_loses_the_tail_of_its_passage(limit: dict[str, int]) -> None:
    tokenizer = tiny_tokenizer()
    row = Encoder(tokenizer, **limit).causal(LONG)
    start = "is this good <unk> bad <unk> film : the film is very"
    end = "Topic : this is it Verdict :"
    assert tokenizer.decode(row.ids) == f"{start} {end} very good {END}"
    assert row.cut == 9
    asked = Encoder(tokenizer, **limit).question(LONG)
    assert tokenizer.decode(asked.ids).startswith(start)
    assert tokenizer.decode(asked.ids).endswith(end)


@pytest.mark.parametrize(
    ("text", "passages"),
    [
        ("one line", ["one line"]),
        ("two\nparagraphs of text", ["\nparagraphs of text"]),
        ("Which?\nOption: a \na first line\n\nand the last", ["\na first line\n\nand the last"]),
        ("Do it.\nparagraph: a long one\nquestion: what", ["paragraph: a long one"]),
        (
            "a: " + 300 * "x" + "\nb: " + 250 * "y" + "\nc: z",
            ["a: " + 300 * "x", "b: " + 250 * "y"],
        ),
    ],
)
def test_passages_are_what_is_long_and_never_the_question(text: str, passages: list[str]) -> None:
    assert [text[a:b] for a, b in passages_of(text)] == passages


def test_what_cannot_be_cut_must_fit() -> None:
    with pytest.raises(DataError, match=r"f:7: 30 tokens, of which only \d+ may.*max_tokens=14"):
        Encoder(tiny_tokenizer(), max_tokens=14).causal(replace(LONG, where="f:7"))


def test_a_long_chat_loses_the_tail_of_what_is_asked() -> None:
    tokenizer = chat_tokenizer()
    messages = (Message("user", "the film is very good and long"), Message("assistant", "quite"))
    row = Encoder(tokenizer, max_tokens=8).causal(Example(messages=messages))
    assert tokenizer.convert_ids_to_tokens(list(row.ids)) == (
        f"<|user|> the film is {END} <|assistant|> quite {END}".split()
    )
