"""Rows as tokens: what is read, what is learned, and what is cut.

A row is rendered as one text and tokenized once, so that training reads exactly what the tokenizer
makes of the whole; the offsets of the tokens tell which of them are answer, and which may be cut.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

from sculpt.data.examples import DataError, Example

IGNORED = -100
LONGEST_QUESTION = 200
"""Characters: a longer part of a prompt is taken for a passage."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """Tokens that a model reads, and what it should learn.

    ids: all tokens of the row, for causal models the answer included.
    labels: for causal models as long as `ids`: the token itself where it is learned, else
        `IGNORED`. For encoder-decoders the answer's tokens; for classifiers the label's number.
    cut: tokens of the passage that were left out.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    cut: int = 0

    @property
    def learned(self) -> int:
        """How many of `labels` are learned."""
        return sum(label != IGNORED for label in self.labels)

    @property
    def answer_start(self) -> int:
        """Of a causal row: place of the first token that is learned."""
        return next(place for place, label in enumerate(self.labels) if label != IGNORED)

    @property
    def last_answer_start(self) -> int:
        """Of a causal row: place of the first token of its last answer."""
        return 1 + max(place for place, label in enumerate(self.labels) if label == IGNORED)


class PackedRows(Sequence[Encoded]):
    """The rows of a task, which become `Encoded` again when they are asked for.

    8 bytes for a token that is read and learned; as tuples it would take five times as much.
    """

    def __init__(self, rows: Iterable[Encoded] = ()) -> None:
        self._ids, self._labels = array("i"), array("i")
        self._id_ends, self._label_ends = array("q", [0]), array("q", [0])
        self._cut = array("i")
        self.extend(rows)

    def extend(self, rows: Iterable[Encoded]) -> None:
        """Add rows at the end."""
        for row in rows:
            self._ids.extend(row.ids)
            self._labels.extend(row.labels)
            self._id_ends.append(len(self._ids))
            self._label_ends.append(len(self._labels))
            self._cut.append(row.cut)

    @property
    def cut(self) -> int:
        """How many rows lost a part of their passage."""
        return sum(cut > 0 for cut in self._cut)

    def __len__(self) -> int:
        return len(self._cut)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...

    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        ids = self._ids[self._id_ends[place] : self._id_ends[place + 1]]
        labels = self._labels[self._label_ends[place] : self._label_ends[place + 1]]
        return Encoded(tuple(ids), tuple(labels), self._cut[place])


@dataclass(frozen=True)
class _Rendered:
    """A whole row as text, with the character ranges of its answers and of its passages."""

    text: str
    answers: tuple[Span, ...]
    passages: tuple[Span, ...]


class Encoder:
    """Turns examples into tokens.

    max_tokens: of a whole row; max_text_tokens: of its passage, the longest part of the text; see
        `passages_of`. What is too long loses the tail of its passage.

    Raises `ValueError` for a tokenizer that cannot tell where its tokens come from.
    """

    def __init__(
        self, tokenizer: Any, *, max_tokens: int | None = None, max_text_tokens: int | None = None
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer={type(tokenizer).__name__}: expected a fast tokenizer, which tells "
                "which characters a token stands for"
            )
        for name, limit in (("max_tokens", max_tokens), ("max_text_tokens", max_text_tokens)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit}, expected at least 1")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.max_text_tokens = max_text_tokens
        # What the tokenizer itself puts around a text, e.g. a begin-of-sequence token.
        self.leading, self.trailing = self._specials()
        self._answers: dict[tuple[str, str], tuple[int, ...]] = {}

    def causal(self, example: Example) -> Encoded:
        """The whole row, with its answers learned."""
        ends = () if example.messages else (self.end_token,)
        leading = () if example.messages else self.leading
        rendered = self._render(example)
        around = len(leading) + len(ends)
        ids, spans, cut = self._tokens(rendered.text, rendered.passages, around, example)
        learned = [
            any(a <= start and end <= b for a, b in rendered.answers) for start, end in spans
        ]
        if not any(learned):
            raise DataError(f"{example.where or 'a row'}: the answer has no token of its own")
        labels = [token if own else IGNORED for token, own in zip(ids, learned, strict=True)]
        labels = [*[IGNORED] * len(leading), *labels, *ends]
        labels[0] = IGNORED  # nothing comes before it that could tell
        return Encoded((*leading, *ids, *ends), tuple(labels), cut)

    def document(self, example: Example) -> list[Encoded]:
        """A document in pieces of at most `max_tokens`, each learned from its second token on."""
        ids = (*self.leading, *self.plain(example.answer), self.end_token)
        size = self.max_tokens or len(ids)
        pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
        return [Encoded(piece, (IGNORED, *piece[1:])) for piece in pieces if len(piece) > 1]

    def question(self, example: Example) -> Encoded:
        """The row up to its last answer; nothing is learned."""
        if not example.messages:
            return self.prompt(example, trailing=False)
        whole = self.causal(example)
        return Encoded(whole.ids[: whole.last_answer_start], (), whole.cut)

    def prompt(self, example: Example, *, trailing: bool = True) -> Encoded:
        """Only what is asked, with the tokenizer's own tokens around it."""
        if example.messages or example.is_document:
            kind = "chat" if example.messages else "document"
            raise DataError(f"{example.where or 'a row'}: a {kind} needs a causal language model")
        after = self.trailing if trailing else ()
        around = len(self.leading) + len(after)
        ids, _, cut = self._tokens(example.prompt, passages_of(example.text), around, example)
        return Encoded((*self.leading, *ids, *after), (), cut)

    def answer(self, example: Example, label: str) -> tuple[int, ...]:
        """Tokens of `label` as they follow the question of `example`, and the end token."""
        if example.messages:
            other = replace(example.messages[-1], content=label)
            whole = self.causal(replace(example, messages=(*example.messages[:-1], other)))
            return whole.ids[whole.last_answer_start :]
        key = (example.suffix or example.text, label)
        if key not in self._answers:
            short = self.causal(Example(answer=label, suffix=key[0]))
            self._answers[key] = short.ids[short.answer_start :]
        return self._answers[key]

    def plain(self, text: str, at_most: int | None = None) -> tuple[int, ...]:
        """Tokens of a text and nothing around it."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"][:at_most])

    @property
    def end_token(self) -> int:
        """The end-of-sequence token. Raises `ValueError` where the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise ValueError("tokenizer.eos_token_id is None, expected an end-of-sequence token")
        return int(self.tokenizer.eos_token_id)

    def _tokens(
        self, text: str, passages: Sequence[Span], around: int, example: Example
    ) -> tuple[list[int], list[Span], int]:
        """Tokens and their character ranges, after the passages have lost what is too much.

        around: how many more tokens the row has.
        """
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = list(found["input_ids"]), list(found["offset_mapping"])
        inside = [
            [i for i, (a, b) in enumerate(spans) if first <= a and b <= last]
            for first, last in passages
        ]
        limit = self.max_tokens
        too_many = 0 if limit is None else max(0, len(ids) + around - limit)
        if self.max_text_tokens is not None and inside:
            too_many = max(too_many, len(inside[0]) - self.max_text_tokens)
        dropped: set[int] = set()
        for passage in inside:
            dropped.update(passage[max(0, len(passage) - (too_many - len(dropped))) :])
        if len(dropped) < too_many:
            raise DataError(
                f"{example.where or 'a row'}: {len(ids)} tokens, of which only {len(dropped)} may "
                f"be cut, do not fit into max_tokens={self.max_tokens}"
            )
        kept = [place for place in range(len(ids)) if place not in dropped]
        return [ids[i] for i in kept], [spans[i] for i in kept], len(dropped)

    def _render(self, example: Example) -> _Rendered:
        if example.messages:
            return self._render_chat(example)
        prompt = example.prompt
        # The blank belongs to the answer: most tokenizers make one token of it and the word.
        between = " " if prompt and not prompt[-1:].isspace() else ""
        text = prompt + between + example.answer
        passages = ((0, len(text)),) if example.is_document else passages_of(example.text)
        return _Rendered(text, ((len(prompt), len(text)),), passages)

    def _render_chat(self, example: Example) -> _Rendered:
        turns = [{"role": m.role, "content": m.content} for m in example.messages]
        whole = self._template(turns, example, question=False)
        answers = []
        for place, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._template(turns[:place], example, question=True)
            after = self._template(turns[: place + 1], example, question=False)
            if not (after.startswith(before) and whole.startswith(after.rstrip())):
                raise DataError(
                    f"{example.where or 'a row'}: the chat template writes message {place + 1} "
                    "differently when others follow it, so its answers cannot be told apart; "
                    "give one row for each answer"
                )
            # What follows the mark that ends the turn is never generated.
            answers.append((len(before), len(after.rstrip())))
        asked = [turn["content"] for turn in turns if turn["role"] != "assistant"]
        longest = max(asked, key=len, default="")
        start = whole.find(longest)
        passages = [(start + a, start + b) for a, b in passages_of(longest)] if start >= 0 else []
        return _Rendered(whole[: answers[-1][1]], tuple(answers), tuple(passages))

    def _template(self, turns: list[dict[str, str]], example: Example, *, question: bool) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                f"{example.where or 'a row'}: the tokenizer has no chat template, which rows with "
                "messages need"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=question
                )
            )
        except Exception as error:  # a template raises what it likes
            raise DataError(f"{example.where or 'a row'}: the chat template: {error}") from error

    def _specials(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        plain, decorated = self.plain("a"), tuple(self.tokenizer("a")["input_ids"])
        for start in range(len(decorated) - len(plain) + 1):
            if decorated[start : start + len(plain)] == plain:
                return decorated[:start], decorated[start + len(plain) :]
        return (), ()


def passages_of(text: str) -> tuple[Span, ...]:
    """Character ranges that may lose their tails, in the order in which they do, longest first.

    A part of a prompt is a line and what follows it, up to the next line that begins with a name
    and a colon, such as "question:". The longest part is the passage, and so are others that are
    longer than any question. A first line that is shorter than what follows it stays: it says what
    to do.
    """
    names = re.finditer(r"\n(?=[^\W\d][\w \-]{0,30}:)", text)
    breaks = [found.start() for found in names]
    starts, ends = [0, *(place + 1 for place in breaks)], [*breaks, len(text)]
    parts = []
    for start, end in zip(starts, ends, strict=True):
        first, *others = text[start:end].split("\n")
        stays = len(first) if others and len(first) < max(map(len, others)) else 0
        parts.append((start + stays, end))
    parts.sort(key=lambda span: span[0] - span[1])
    return tuple(parts[:1] + [(a, b) for a, b in parts[1:] if b - a > LONGEST_QUESTION])
