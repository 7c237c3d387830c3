"""What a training loop needs from a model: a loss on a batch, and its accuracy on a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from sculpt.text_tasks import Example, Task


@dataclass(frozen=True)
class Score:
    """Accuracies in [0, 1] on the test examples of one task.

    generated: the answer the model gives when nothing restricts it is exactly the label.
    among_labels: the right label is the most likely one among the task's own labels.
    """

    generated: float
    among_labels: float


class Learner(Protocol):
    """A model together with the way it reads examples and answers."""

    @property
    def model(self) -> torch.nn.Module:
        """The module whose matrices are trained."""

    def loss(self, examples: Sequence[Example], task: Task) -> tuple[torch.Tensor, int]:
        """Mean loss of the batch with its graph, and the number of tokens it read."""

    def score(self, task: Task) -> Score:
        """Accuracies on `task.test`; no gradients, and the training mode is restored."""

    def save(self, path: Path) -> None:
        """Write model and tokenizer as a plain Hugging Face directory."""
