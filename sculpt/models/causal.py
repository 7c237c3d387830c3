"""Causal language models that answer in words.

An answer is a blank, its text, and the end-of-sequence token; the prompt is never learned. Batches
are padded on the left, so that all answers end at the last position, and masked by length: many
tokenizers pad with the end-of-sequence token, which is also part of every answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F

from sculpt.data.examples import NEXT_TOKEN, Example, Task
from sculpt.models.answers import GenerativeLearner
from sculpt.models.encoding import IGNORED, Encoded
from sculpt.models.learner import Score, pad


class CausalLearner(GenerativeLearner):
    """A Hugging Face causal language model with its tokenizer.

    packing: lay the rows of a batch end to end in one sequence, without padding, each in its own
        attention. Otherwise they are padded to the longest.

    Raises `ValueError` also for a model in which packed rows would see each other.
    """

    auto_class = "AutoModelForCausalLM"

    def __init__(
        self, model: Any, tokenizer: Any, *, packing: bool = False, **options: Any
    ) -> None:
        super().__init__(model, tokenizer, **options)
        self.packing = packing
        if packing:
            self._check_packing()

    def encode(self, example: Example) -> Encoded:
        return self.encoder.causal(example)

    def encode_all(self, example: Example) -> list[Encoded]:
        return self.encoder.document(example) if example.is_document else [self.encode(example)]

    def loss(self, rows: Sequence[Encoded]) -> tuple[torch.Tensor, int]:
        """Mean cross-entropy over all learned tokens, terminators included."""
        # The last token is a target but never an input.
        tokens = sum(len(row.ids) - 1 for row in rows)
        if self.packing:
            return self._packed_loss(rows), tokens
        inputs = self._left_padded([row.ids[:-1] for row in rows])
        answers = [row.labels[row.answer_start :] for row in rows]
        targets = pad(answers, IGNORED, left=True).to(self.device)  # [B, A]
        window = targets.shape[1]
        logits = self.model(**inputs, logits_to_keep=window, use_cache=False).logits  # [B, A, V]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        return loss, tokens

    def _packed_loss(self, rows: Sequence[Encoded]) -> torch.Tensor:
        ids = [token for row in rows for token in row.ids[:-1]]
        targets = torch.tensor([label for row in rows for label in row.labels[1:]])
        learned = (targets != IGNORED).nonzero()[:, 0]
        logits = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            # Positions that start again mark where one row ends and the next begins.
            position_ids=torch.tensor(
                [[place for row in rows for place in range(len(row.ids) - 1)]], device=self.device
            ),
            logits_to_keep=learned.to(self.device),
            use_cache=False,
        ).logits[0]  # [learned, V]
        return F.cross_entropy(logits, targets[learned].to(self.device))

    @torch.no_grad()
    def _check_packing(self) -> None:
        one = Encoded((0, 1, 0, 1), (IGNORED, 1, 0, 1))
        two = Encoded((1, 1, 0), (IGNORED, 1, 0))
        was_training = self.model.training
        self.model.eval()
        apart = (3 * self._packed_loss([one]) + 2 * self._packed_loss([two])) / 5
        together = self._packed_loss([one, two])
        self.model.train(was_training)
        tolerance = 100 * torch.finfo(apart.dtype).eps * float(apart.abs().clamp(min=1))
        if not abs(float(apart - together)) <= tolerance:
            raise ValueError(
                f"packing: in {type(self.model).__name__} packed rows see each other (loss "
                f"{float(together):.6g} together, {float(apart):.6g} apart); use bucketing instead"
            )

    def _documents(self, task: Task) -> Score:
        """Share of the tokens of all documents that are the most likely next one."""
        right = total = 0
        for row in chain.from_iterable(map(self.encode_all, task.test)):
            inputs = self._left_padded([row.ids[:-1]])
            logits = self.model(**inputs, use_cache=False).logits[0]
            right += int((logits.argmax(dim=-1).cpu() == torch.tensor(row.labels[1:])).sum())
            total += len(row.ids) - 1
        return Score(right / total, more={NEXT_TOKEN: right / total})

    def _question(self, example: Example) -> tuple[int, ...]:
        return self.encoder.question(example).ids

    def _answer(self, example: Example, label: str) -> tuple[int, ...]:
        return self.encoder.answer(example, label)

    def _write(self, questions: Sequence[Sequence[int]]) -> list[list[int]]:
        inputs = self._left_padded(questions)
        del inputs["position_ids"]  # `generate` counts on its own
        width = inputs["input_ids"].shape[1]
        return [row[width:] for row in self._generate(inputs)]

    def _label_logits(
        self, questions: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]
    ) -> torch.Tensor:
        """The prompts run once; all labels then continue from their key-value cache."""
        inputs = self._left_padded(questions)
        output = self.model(**inputs, logits_to_keep=1, use_cache=True)
        n_rows, n_labels = len(answers), len(answers[0])
        flat = [answer for row in answers for answer in row]
        width = max(len(answer) for answer in flat)
        device = output.logits.device
        first: torch.Tensor = output.logits[:, None].expand(-1, n_labels, -1, -1)  # [B, L, 1, V]
        if width == 1:
            return first
        continuation = self.padded([answer[:-1] for answer in flat], 0)  # [B*L, A-1]
        cache = output.past_key_values
        cache.batch_repeat_interleave(n_labels)
        seen = inputs["attention_mask"].repeat_interleave(n_labels, dim=0)  # [B*L, P]
        after = self.model(
            input_ids=continuation["input_ids"],
            attention_mask=torch.cat([seen, continuation["attention_mask"]], dim=1),
            position_ids=seen.sum(dim=1, keepdim=True) + torch.arange(width - 1, device=device),
            past_key_values=cache,
            use_cache=True,
        ).logits.unflatten(0, (n_rows, n_labels))  # [B, L, A-1, V]
        both: torch.Tensor = torch.cat([first, after], dim=2)
        return both

    def _left_padded(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        inputs = self.padded(rows, self.end, left=True)
        positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return inputs | {"position_ids": positions}
