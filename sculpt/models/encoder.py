"""Sentence encoders that answer with the nearest label.

The head is frozen: its rows are the sentence embeddings that the initial encoder gives to the
label texts. A label's text is what asks for it, as in the prompts of its task, and the label.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sculpt.data.examples import Task
from sculpt.models.classifying import Classifying
from sculpt.models.learner import load_pretrained


class EncoderLearner(Classifying):
    """A BERT-like encoder, mean pooling, and cosine similarity to the labels of all `tasks`.

    scale: multiplies the cosine similarities, which are the logits after it.
    Tasks may share a label. Raises `ValueError` when they ask for it in different words.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tasks: Sequence[Task],
        *,
        scale: float = 20.0,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, tasks, **options)
        self.scale = scale
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
    def from_directory(
        cls,
        path: Path,
        tasks: Sequence[Task],
        *,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> EncoderLearner:
        """Load a plain encoder directory, without the pooler that nothing reads."""
        loaded = load_pretrained("AutoModel", path, dtype, add_pooling_layer=False)
        return cls(*loaded, tasks, **options)

    def _logits(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        return self.scale * self._embed(rows) @ self.head.T, sum(len(row) for row in rows)

    def _embed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Unit sentence embeddings [B, d] of token rows."""
        inputs = self._padded(rows)
        hidden = self.model(**inputs).last_hidden_state  # [B, T, d]
        weights = inputs["attention_mask"][..., None].to(hidden.dtype)
        pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        return F.normalize(pooled, dim=-1)
