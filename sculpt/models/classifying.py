"""Models that answer with a label: by a classification head, or by the nearest label.

All tasks share one head. A separate head for each task would hide forgetting; with one head, a
model that drifts starts to answer earlier tasks with the labels of the last one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sculpt.data.examples import DataError, Example, Task
from sculpt.models.encoding import Encoded
from sculpt.models.learner import Learner, Score


class LabelLearner(Learner):
    """What all of them share: a row's label is its number among `labels`, those of all `tasks`.

    Raises `ValueError` for a task without labels.
    """

    def __init__(self, model: Any, tokenizer: Any, tasks: Sequence[Task], **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
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

    def _score(self, task: Task) -> Score:
        """`generated`: the label is the most likely of the labels of all tasks; `among_labels`: of
        the labels of `task`."""
        own = torch.tensor([self.labels.index(label) for label in task.labels])
        rows = sorted(map(self.encode, task.test), key=lambda row: len(row.ids))
        generated = among = 0
        for start in range(0, len(rows), self.score_batch):
            batch = rows[start : start + self.score_batch]
            logits = self._logits([row.ids for row in batch])[0].cpu()
            gold = torch.tensor([row.labels[0] for row in batch])
            generated += int((logits.argmax(dim=1) == gold).sum())
            among += int((own[logits[:, own].argmax(dim=1)] == gold).sum())
        return Score(generated / len(rows), among / len(rows))

    def _inputs(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        return self.padded(rows, int(self.tokenizer.pad_token_id or 0))


class ClassificationLearner(LabelLearner):
    """A Hugging Face model with a sequence classification head over all labels of all tasks."""

    auto_class = "AutoModelForSequenceClassification"

    def __init__(self, model: Any, tokenizer: Any, tasks: Sequence[Task], **options: Any) -> None:
        super().__init__(model, tokenizer, tasks, **options)
        if model.config.pad_token_id is None:  # models that classify by their last token need one
            model.config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id

    @classmethod
    def load_options(cls, tasks: Sequence[Task]) -> dict[str, Any]:
        """A head that does not fit the labels is made anew."""
        labels = labels_of(tasks)
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
            "ignore_mismatched_sizes": True,
        }

    def free_parameters(self) -> list[torch.nn.Parameter]:
        """The head: everything outside of the base model."""
        inside = {id(parameter) for parameter in self.model.base_model.parameters()}
        return [p for p in self.model.parameters() if id(p) not in inside]

    def _logits(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        logits: Tensor = self.model(**self._inputs(rows)).logits
        return logits, sum(len(row) for row in rows)


class NearestLabelLearner(LabelLearner):
    """A BERT-like sentence encoder: the cosine of its mean state to the labels of all tasks.

    The head is frozen: its rows are the sentence embeddings that the initial encoder gives to the
    label texts. A label's text is what asks for it, as in the prompts of its task, and the label.

    scale: multiplies the cosine similarities, which are the logits after it.
    Tasks may share a label. Raises `ValueError` when they ask for it in different words.
    """

    auto_class = "AutoModel"
    scale = 20.0

    def __init__(self, model: Any, tokenizer: Any, tasks: Sequence[Task], **options: Any) -> None:
        super().__init__(model, tokenizer, tasks, **options)
        around = self.encoder
        texts: dict[str, str] = {}
        for task in tasks:
            for label in task.labels:
                text = f"{task.train[0].suffix} {label}"
                if texts.setdefault(label, text) != text:
                    raise ValueError(
                        f"label {label!r} of task {task.name!r} is asked for by {text!r}, and by "
                        f"{texts[label]!r} in an earlier task: expected the same"
                    )
        with torch.no_grad():
            rows = [
                (*around.leading, *around.plain(texts[label]), *around.trailing)
                for label in self.labels
            ]
            self.head = self._embed(rows)  # [labels, d]

    @classmethod
    def load_options(cls, tasks: Sequence[Task]) -> dict[str, Any]:
        """Nothing reads a pooler."""
        return {"add_pooling_layer": False}

    def _logits(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        return self.scale * self._embed(rows) @ self.head.T, sum(len(row) for row in rows)

    def _embed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Unit sentence embeddings [B, d] of token rows."""
        inputs = self._inputs(rows)
        hidden = self.model(**inputs).last_hidden_state  # [B, T, d]
        weights = inputs["attention_mask"][..., None].to(hidden.dtype)
        pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        return F.normalize(pooled, dim=-1)


def labels_of(tasks: Sequence[Task]) -> list[str]:
    """Labels of all tasks in order, each once. Raises `DataError` for a task without any."""
    for task in tasks:
        if not task.labels:
            raise DataError(f"task {task.name!r} has no labels, which a classifier chooses from")
    return list(dict.fromkeys(label for task in tasks for label in task.labels))
