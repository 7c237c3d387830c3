"""A task: labelled texts, and the words that ask for the label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Example:
    """One text with its label."""

    text: str
    label: str


@dataclass(frozen=True)
class Task:
    """A text classification task that a language model answers in words.

    `suffix` follows the text and asks for the label, e.g. `"\\nTopic:"`; the answer is one of
    `labels`. Raises `ValueError` for fewer than two labels, repeated or empty labels, empty splits,
    or an example whose label is not one of `labels`.
    """

    name: str
    suffix: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"task {self.name!r}: labels={self.labels}, expected two or more")
        if not all(label.strip() for label in self.labels):
            raise ValueError(f"task {self.name!r}: labels={self.labels} has an empty label")
        for split, examples in (("train", self.train), ("test", self.test)):
            if not examples:
                raise ValueError(f"task {self.name!r}: {split} is empty")
            unknown = {example.label for example in examples} - set(self.labels)
            if unknown:
                raise ValueError(
                    f"task {self.name!r}: {split} has labels {sorted(unknown)} "
                    f"that are not in {self.labels}"
                )


def batches(
    examples: Sequence[Example], batch_size: int, generator: torch.Generator
) -> Iterator[list[Example]]:
    """Endless batches in a seeded order; every example is used once before any is used again."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}, expected at least 1")
    pending: list[Example] = []
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        pending.extend(examples[index] for index in order)
        while len(pending) >= batch_size:
            yield pending[:batch_size]
            del pending[:batch_size]
