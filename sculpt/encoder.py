"""Sentence encoders that answer with the nearest label, all tasks sharing one head.

The head is frozen: its rows are the sentence embeddings that the initial encoder gives to the
label texts. A separate head for each task would hide forgetting; with one head for all tasks, an
encoder that drifts starts to answer earlier tasks with the labels of the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sculpt.learner import Score
from sculpt.text_tasks import Example, Task


class EncoderLearner:
    """A BERT-like encoder, mean pooling, and cosine similarity to the labels of all `tasks`.

    scale: multiplies the cosine similarities, which are the logits after it.
    Raises `ValueError` when two tasks share a label.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tasks: Sequence[Task],
        *,
        max_text_tokens: int = 40,
        scale: float = 20.0,
    ) -> None:
        self.labels = [label for task in tasks for label in task.labels]
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels={self.labels}: expected no label in two tasks")
        self.model = model
        self.tokenizer = tokenizer
        self.max_text_tokens = max_text_tokens
        self.scale = scale
        with torch.no_grad():
            self.head = self._embed(self.labels)[0]  # [labels, d]

    @classmethod
    def from_directory(
        cls, path: Path, tasks: Sequence[Task], *, max_text_tokens: int = 40
    ) -> EncoderLearner:
        """Load a plain encoder directory in float32, without the pooler that nothing reads."""
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(path, dtype=torch.float32, add_pooling_layer=False)
        tokenizer = AutoTokenizer.from_pretrained(path)
        return cls(model.eval(), tokenizer, tasks, max_text_tokens=max_text_tokens)

    def save(self, path: Path) -> None:
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def loss(self, examples: Sequence[Example], task: Task) -> tuple[torch.Tensor, int]:
        """Mean cross-entropy over the labels of all tasks."""
        embeddings, tokens = self._embed([example.text for example in examples])
        gold = [self.labels.index(example.label) for example in examples]
        logits = self._logits(embeddings)
        return F.cross_entropy(logits, torch.tensor(gold, device=logits.device)), tokens

    @torch.no_grad()
    def score(self, task: Task, *, batch_size: int = 32) -> Score:
        """`generated`: the label is the nearest of the labels of all tasks; `among_labels`: of
        the labels of `task`."""
        was_training = self.model.training
        self.model.eval()
        own = torch.tensor([self.labels.index(label) for label in task.labels])
        examples = sorted(task.test, key=lambda example: len(example.text))
        generated = among = 0
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            logits = self._logits(self._embed([example.text for example in batch])[0]).cpu()
            gold = torch.tensor([self.labels.index(example.label) for example in batch])
            generated += int((logits.argmax(dim=1) == gold).sum())
            among += int((own[logits[:, own].argmax(dim=1)] == gold).sum())
        self.model.train(was_training)
        return Score(generated / len(examples), among / len(examples))

    def _logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self.scale * embeddings @ self.head.T  # [B, labels]

    def _embed(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        """Unit sentence embeddings [B, d], and the number of tokens read."""
        device = next(self.model.parameters()).device
        inputs = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_text_tokens,
            return_tensors="pt",
        ).to(device)
        hidden = self.model(**inputs).last_hidden_state  # [B, T, d]
        mask = inputs["attention_mask"][..., None].to(hidden.dtype)
        pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return F.normalize(pooled, dim=-1), int(mask.sum())
