"""Sentence encoders that answer with the nearest label, all tasks sharing one head.

The head is frozen: its rows are the sentence embeddings that the initial encoder gives to the
label texts. A separate head for each task would hide forgetting; with one head for all tasks, an
encoder that drifts starts to answer earlier tasks with the labels of the last one.

As in a prompt, the text, cut to a number of tokens, is followed by the task's suffix, which is
never cut; a label's text is the suffix and the label.
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
            rows = [self._ids(task.suffix + " " + label) for task in tasks for label in task.labels]
            self.head = self._embed(rows)[0]  # [labels, d]

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

    def prompt_ids(self, text: str, task: Task) -> list[int]:
        """Tokens of the cut text and the whole suffix."""
        return self._ids(text, self.max_text_tokens) + self._ids(task.suffix)

    def loss(self, examples: Sequence[Example], task: Task) -> tuple[torch.Tensor, int]:
        """Mean cross-entropy over the labels of all tasks."""
        embeddings, tokens = self._embed([self.prompt_ids(e.text, task) for e in examples])
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
            rows = [self.prompt_ids(example.text, task) for example in batch]
            logits = self._logits(self._embed(rows)[0]).cpu()
            gold = torch.tensor([self.labels.index(example.label) for example in batch])
            generated += int((logits.argmax(dim=1) == gold).sum())
            among += int((own[logits[:, own].argmax(dim=1)] == gold).sum())
        self.model.train(was_training)
        return Score(generated / len(examples), among / len(examples))

    def _logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self.scale * embeddings @ self.head.T  # [B, labels]

    def _embed(self, rows: Sequence[list[int]]) -> tuple[torch.Tensor, int]:
        """Unit sentence embeddings [B, d] of token rows, and the number of tokens read."""
        device = next(self.model.parameters()).device
        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        full = [[first, *row, last] for row in rows]
        width = max(len(row) for row in full)
        ids = torch.zeros(len(full), width, dtype=torch.long)
        mask = torch.zeros(len(full), width, dtype=torch.long)
        for index, row in enumerate(full):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        ids, mask = ids.to(device), mask.to(device)
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # [B, T, d]
        weights = mask[..., None].to(hidden.dtype)
        pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        return F.normalize(pooled, dim=-1), int(mask.sum())

    def _ids(self, text: str, at_most: int | None = None) -> list[int]:
        cut = {} if at_most is None else {"truncation": True, "max_length": at_most}
        return list(self.tokenizer(text, add_special_tokens=False, **cut)["input_ids"])
