"""Scores of models that answer in words, whatever their architecture."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from sculpt.data.examples import EXACT_MATCH, Example, Task
from sculpt.models.learner import Learner, Score
from sculpt.models.scoring import measures


class GenerativeLearner(Learner):
    """What causal and encoder-decoder models share: labels ranked, answers written.

    max_new_tokens: where a free answer is cut.

    Raises `ValueError` for a tokenizer without an end-of-sequence token.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_new_tokens: int = 64, **options: Any
    ) -> None:
        super().__init__(model, tokenizer, **options)
        self.max_new_tokens = max_new_tokens
        self.end = self.encoder.end_token

    @abstractmethod
    def _question(self, example: Example) -> tuple[int, ...]:
        """Tokens that are read before the answer."""

    @abstractmethod
    def _answer(self, example: Example, label: str) -> tuple[int, ...]:
        """Tokens that are written, the end token included."""

    @abstractmethod
    def _write(self, questions: Sequence[Sequence[int]]) -> list[list[int]]:
        """Greedy continuations, without the question."""

    @abstractmethod
    def _label_logits(
        self, questions: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]
    ) -> torch.Tensor:
        """Logits of each token of each label's answer, the ones before it given: [B, L, A, V]."""

    @abstractmethod
    def _documents(self, task: Task) -> Score:
        """Scores on a task of documents, which ask nothing."""

    def _score(self, task: Task) -> Score:
        """`generated`: greedy decoding writes the answer and then stops, or another measure of what
        it writes. `among_labels`: the right label has the largest total log-probability of all
        label tokens and the terminator."""
        if task.test[0].is_document:
            return self._documents(task)
        # Rows of similar length share a batch: less padding.
        asked = sorted(
            ((self._question(example), example) for example in task.test),
            key=lambda pair: len(pair[0]),
        )
        # Whether a label is written exactly is known without writing it.
        written = not task.labels or task.measure != EXACT_MATCH
        exact = among = 0
        answers: list[str] = []
        for start in range(0, len(asked), self.score_batch):
            batch = asked[start : start + self.score_batch]
            questions = [question for question, _ in batch]
            if task.labels:
                log_probability, greedy = self._rank(batch, task.labels)  # [B, L] each
                gold = torch.tensor([task.labels.index(e.wanted) for _, e in batch])
                exact += int(greedy[torch.arange(len(batch)), gold].sum())
                among += int((log_probability.argmax(dim=1) == gold).sum())
            if written:
                answers += [self._text(row) for row in self._write(questions)]
        size = len(asked)
        generated, more = exact / size, {}
        if written:
            more = measures(answers, [e.wanted for _, e in asked], task.labels)
            generated = more[task.measure]
        return Score(generated, among / size if task.labels else float("nan"), more)

    def _rank(
        self, batch: Sequence[tuple[Sequence[int], Example]], labels: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each label's answer, and whether greedy decoding writes it: [B, L]."""
        answers = [[self._answer(example, label) for label in labels] for _, example in batch]
        padded = self.padded([answer for row in answers for answer in row], 0)
        wanted, mask = (part.view(len(batch), len(labels), -1) for part in padded.values())
        mask = mask.bool()  # [B, L, A]
        logits = self._label_logits([question for question, _ in batch], answers).float()
        chosen = logits.log_softmax(dim=-1).gather(-1, wanted[..., None])[..., 0]
        log_probability = chosen.masked_fill(~mask, 0.0).sum(dim=-1)
        greedy = ((logits.argmax(dim=-1) == wanted) | ~mask).all(dim=-1)
        return log_probability.cpu(), greedy.cpu()

    def _generate(self, inputs: dict[str, Any]) -> list[list[int]]:
        written = self.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=self.end,
            pad_token_id=self.end,
        )
        rows: list[list[int]] = written.tolist()
        return rows

    def _text(self, tokens: Sequence[int]) -> str:
        """Written tokens up to the end token, as text."""
        row = list(tokens)
        if self.end in row:
            row = row[: row.index(self.end)]
        return str(self.tokenizer.decode(row, skip_special_tokens=True)).strip()
