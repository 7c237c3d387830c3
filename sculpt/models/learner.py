"""What every model of a run can do: rows as tokens, a loss on a batch, scores on a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sculpt.data.examples import Example, Task
from sculpt.models.encoding import Encoded, Encoder
from sculpt.models.load import load_pretrained


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


class Learner(ABC):
    """A Hugging Face model with its tokenizer, and the way it reads examples and answers.

    max_tokens, max_text_tokens: see `Encoder`. score_batch: rows scored at once.
    auto_class: name of the `AutoModel` class that loads it.
    """

    auto_class: str

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_tokens: int | None = None,
        max_text_tokens: int | None = None,
        score_batch: int = 24,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer, max_tokens=max_tokens, max_text_tokens=max_text_tokens)
        self.score_batch = score_batch

    @classmethod
    def from_directory(
        cls, path: Path, *arguments: Any, dtype: torch.dtype = torch.float32, **options: Any
    ) -> Self:
        """Load a plain directory. Raises `ValueError` when it does not hold such a model."""
        loaded = load_pretrained(cls.auto_class, path, dtype, **cls.load_options(*arguments))
        return cls(*loaded, *arguments, **options)

    @classmethod
    def load_options(cls, *arguments: Any) -> dict[str, Any]:
        """What `from_pretrained` is told beside path and dtype."""
        return {}

    def free_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that every method trains freely: a new classification head."""
        return []

    @abstractmethod
    def encode(self, example: Example) -> Encoded:
        """Tokens to learn from. Raises `DataError` for a row that does not fit this model."""

    def encode_all(self, example: Example) -> list[Encoded]:
        """The same for an example that may be several rows: a long document."""
        return [self.encode(example)]

    @abstractmethod
    def loss(self, rows: Sequence[Encoded]) -> tuple[Tensor, int]:
        """Mean loss over all that is learned in the batch, and the number of tokens it read."""

    @torch.no_grad()
    def score(self, task: Task) -> Score:
        """Scores on `task.test`; the training mode is restored."""
        was_training = self.model.training
        self.model.eval()
        try:
            return self._score(task)
        finally:
            self.model.train(was_training)

    @abstractmethod
    def _score(self, task: Task) -> Score: ...

    def save(self, path: Path) -> None:
        """Write model and tokenizer as a plain Hugging Face directory."""
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def padded(
        self, rows: Sequence[Sequence[int]], fill: int, *, left: bool = False
    ) -> dict[str, Tensor]:
        """Token rows as `input_ids` and `attention_mask`, `(len(rows), longest)`."""
        ids = pad(rows, fill, left=left)
        mask = pad([[1] * len(row) for row in rows], 0, left=left)
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}


def pad(rows: Sequence[Sequence[int]], fill: int, *, left: bool = False) -> Tensor:
    """Rows as one tensor, `(len(rows), longest)`."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    side = "left" if left else "right"
    return pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side)
