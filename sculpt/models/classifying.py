"""Models that answer with a label: by a classification head, or by the nearest label.

All tasks share one head. A separate head for each task would hide forgetting; with one head, a
model that drifts starts to answer earlier tasks with the labels of the last one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sculpt.data.examples import DataError, Example, Task
from sculpt.models.encoding import Encoded, Encoder
from sculpt.models.learner import Saved, Score, load_pretrained


class Classifying(Saved):
    """What all of them share: a row's label is its number among `labels`.

    Raises `ValueError` for a task without labels.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tasks: Sequence[Task],
        *,
        max_tokens: int | None = None,
        max_text_tokens: int | None = None,
        score_batch: int = 32,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer, max_tokens=max_tokens, max_text_tokens=max_text_tokens)
        self.score_batch = score_batch
        self.labels = labels_of(tasks)

    @abstractmethod
    def _logits(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        """Logits [B, labels] of token rows, and the number of tokens read."""

    def encode(self, example: Example) -> Encoded:
        asked = self.encoder.prompt(example)
        return Encoded(asked.ids, (self.labels.index(example.answer),), asked.cut)

    def loss(self, rows: Sequence[Encoded]) -> tuple[Tensor, int]:
        """Mean cross-entropy over the labels of all tasks."""
        logits, tokens = self._logits([row.ids for row in rows])
        gold = torch.tensor([row.labels[0] for row in rows], device=logits.device)
        return F.cross_entropy(logits, gold), tokens

    @torch.no_grad()
    def score(self, task: Task) -> Score:
        """`generated`: the label is the most likely of the labels of all tasks; `among_labels`: of
        the labels of `task`."""
        was_training = self.model.training
        self.model.eval()
        own = torch.tensor([self.labels.index(label) for label in task.labels])
        rows = sorted(map(self.encode, task.test), key=lambda row: len(row.ids))
        generated = among = 0
        for start in range(0, len(rows), self.score_batch):
            batch = rows[start : start + self.score_batch]
            logits = self._logits([row.ids for row in batch])[0].cpu()
            gold = torch.tensor([row.labels[0] for row in batch])
            generated += int((logits.argmax(dim=1) == gold).sum())
            among += int((own[logits[:, own].argmax(dim=1)] == gold).sum())
        self.model.train(was_training)
        return Score(generated / len(rows), among / len(rows))

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        width = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(rows), width), int(pad) if pad is not None else 0)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        device = next(self.model.parameters()).device
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


class ClassificationLearner(Classifying):
    """A Hugging Face model with a sequence classification head over all labels of all tasks."""

    @classmethod
    def from_directory(
        cls,
        path: Path,
        tasks: Sequence[Task],
        *,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> ClassificationLearner:
        """Load a plain directory; a head that does not fit the labels is made anew.

        Raises `ValueError` when the directory does not hold such a model.
        """
        labels = labels_of(tasks)
        model, tokenizer = load_pretrained(
            "AutoModelForSequenceClassification",
            path,
            dtype,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
            ignore_mismatched_sizes=True,
        )
        if model.config.pad_token_id is None:  # models that classify by their last token need one
            model.config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
        return cls(model, tokenizer, tasks, **options)

    def free_parameters(self) -> list[torch.nn.Parameter]:
        """The head: everything outside of the base model."""
        inside = {id(parameter) for parameter in self.model.base_model.parameters()}
        return [p for p in self.model.parameters() if id(p) not in inside]

    def _logits(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        logits: Tensor = self.model(**self._padded(rows)).logits
        return logits, sum(len(row) for row in rows)


def labels_of(tasks: Sequence[Task]) -> list[str]:
    """Labels of all tasks in order, each once. Raises `DataError` for a task without any."""
    for task in tasks:
        if not task.labels:
            raise DataError(f"task {task.name!r} has no labels, which a classifier chooses from")
    return list(dict.fromkeys(label for task in tasks for label in task.labels))
