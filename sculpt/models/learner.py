"""What a run needs from a model: rows as tokens, a loss on a batch, and scores on a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from sculpt.data.examples import Example, Task
from sculpt.models.directory import check_directory
from sculpt.models.encoding import Encoded


@dataclass(frozen=True)
class Score:
    """Scores in [0, 1] on the test examples of one task.

    generated: the task's own measure of the answers that the model gives when nothing restricts it:
        the share that is exactly the wanted answer, unless the task names another measure.
    among_labels: the right label is the most likely one among the task's own labels; NaN for a task
        without labels.
    more: other measures of the generated answers, by name.
    """

    generated: float
    among_labels: float = float("nan")
    more: dict[str, float] = field(default_factory=dict)


class Learner(Protocol):
    """A model together with the way it reads examples and answers."""

    @property
    def model(self) -> torch.nn.Module:
        """The module whose matrices are trained."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""

    def free_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that every method trains freely: a new classification head."""

    def encode(self, example: Example) -> Encoded:
        """Tokens to learn from. Raises `DataError` for a row that does not fit this model."""

    def encode_all(self, example: Example) -> list[Encoded]:
        """The same for an example that may be several rows: a long document."""

    def loss(self, rows: Sequence[Encoded]) -> tuple[torch.Tensor, int]:
        """Mean loss over all that is learned in the batch, and the number of tokens it read."""

    def score(self, task: Task) -> Score:
        """Scores on `task.test`; no gradients, and the training mode is restored."""

    def save(self, path: Path) -> None:
        """Write model and tokenizer as a plain Hugging Face directory."""


class Saved(ABC):
    """A Hugging Face model with its tokenizer, saved as one directory."""

    model: Any
    tokenizer: Any

    def free_parameters(self) -> list[torch.nn.Parameter]:
        return []

    @abstractmethod
    def encode(self, example: Example) -> Encoded:
        """As `Learner.encode`."""

    def encode_all(self, example: Example) -> list[Encoded]:
        return [self.encode(example)]

    def save(self, path: Path) -> None:
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)


def load_pretrained(kind: str, path: Path, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer of a directory. `kind` is the name of an `AutoModel` class.

    Raises `ValueError` when the directory does not hold such a model.
    """
    import transformers

    check_directory(path)
    try:
        model = getattr(transformers, kind).from_pretrained(path, dtype=dtype, **options)
    except Exception as error:  # whatever is wrong with the files, in any of several libraries
        raise ValueError(f"model={path}: {kind} cannot read it: {error}") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise ValueError(
            f"model={path}: no tokenizer can be read there (tokenizer.json, ...): {error}"
        ) from error
    return model.eval(), tokenizer
