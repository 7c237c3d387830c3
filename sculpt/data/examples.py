"""A task and its examples, whatever file they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

EXACT_MATCH, ROUGE_L, CHOICE, NEXT_TOKEN = "exact_match", "rouge_l", "choice", "next_token"


class DataError(ValueError):
    """Data cannot be used; the message names file and line."""


@dataclass(frozen=True)
class Message:
    """One turn of a chat; `role` is "system", "user", "assistant" or "tool"."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One row, of one of three kinds.

    Question and answer: the model reads `text + suffix` and writes `answer`. Where a row is too
    long, the longest line of `text` loses its tail; `suffix`, which asks for the answer, is whole.
    Document: only `answer`, which is the document; all of it is learned.
    Chat: `messages`, of which the assistant's are learned; the last one is the answer.

    where: file and line, for messages.
    """

    text: str = ""
    answer: str = ""
    suffix: str = ""
    messages: tuple[Message, ...] = ()
    where: str = field(default="", compare=False, repr=False)

    @property
    def prompt(self) -> str:
        return self.text + self.suffix

    @property
    def is_document(self) -> bool:
        return not self.messages and not self.prompt

    @property
    def wanted(self) -> str:
        """What a perfect model writes."""
        return self.messages[-1].content if self.messages else self.answer


@dataclass(frozen=True)
class Task:
    """Examples to learn from and to be tested on.

    labels: the answers that there are, two or more; none for a task with free answers.
    measure: how a generated answer is scored: `EXACT_MATCH`, `ROUGE_L` or `CHOICE`; documents are
        measured by `NEXT_TOKEN`.

    Raises `DataError` for a single, repeated or empty label, or an empty split.
    """

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    labels: tuple[str, ...] = ()
    measure: str = EXACT_MATCH

    def __post_init__(self) -> None:
        where = f"task {self.name!r}"
        if self.labels and (len(self.labels) < 2 or len(set(self.labels)) != len(self.labels)):
            raise DataError(f"{where}: labels={self.labels}, expected two or more, all different")
        if not all(label.strip() for label in self.labels):
            raise DataError(f"{where}: labels={self.labels} has an empty label")
        if self.measure == CHOICE and not self.labels:
            raise DataError(f"{where}: measure={CHOICE!r} needs labels to choose from")
        for split, examples in (("train", self.train), ("test", self.test)):
            if not examples:
                raise DataError(f"{where}: {split} is empty")
