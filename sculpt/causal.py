"""Causal language models that answer a task in words.

A prompt is the text, cut to a number of tokens, followed by the task's suffix, which is never
cut; the answer is a space, the label, and the end-of-sequence token. Batches are padded on the
left, so that all answers end at the last position, and masked by length: many tokenizers pad with
the end-of-sequence token, which is also part of every answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sculpt.learner import Score
from sculpt.text_tasks import Example, Task

IGNORED = -100


class CausalLearner:
    """A Hugging Face causal language model with its tokenizer.

    Raises `ValueError` for a tokenizer without an end-of-sequence token or `max_text_tokens < 1`.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_text_tokens: int = 40) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer.eos_token_id is None, expected an end-of-sequence token")
        if max_text_tokens < 1:
            raise ValueError(f"max_text_tokens={max_text_tokens}, expected at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.max_text_tokens = max_text_tokens
        # What the tokenizer itself puts in front of a text, e.g. a begin-of-sequence token.
        self._prefix = self._leading_specials()

    @classmethod
    def from_directory(cls, path: Path, *, max_text_tokens: int = 40) -> CausalLearner:
        """Load a plain directory in float32. Raises `ValueError` when it is not one."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not (path / "config.json").is_file():
            raise ValueError(
                f"model={path}: no config.json there, expected a Hugging Face model directory"
            )
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"model={path}: expected a causal language model with its tokenizer: {error}"
            ) from error
        return cls(model, tokenizer, max_text_tokens=max_text_tokens)

    def save(self, path: Path) -> None:
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def prompt_ids(self, text: str, task: Task) -> list[int]:
        """Tokens of the cut text and the whole suffix."""
        return self._prefix + self._ids(text, self.max_text_tokens) + self._ids(task.suffix)

    def answer_ids(self, label: str) -> list[int]:
        """Tokens of the label and the end-of-sequence token."""
        return [*self._ids(" " + label), int(self.tokenizer.eos_token_id)]

    def loss(self, examples: Sequence[Example], task: Task) -> tuple[torch.Tensor, int]:
        """Mean cross-entropy over the answer tokens, terminators included."""
        prompts = [self.prompt_ids(example.text, task) for example in examples]
        answers = [self.answer_ids(example.label) for example in examples]
        # The terminator is a target but never an input.
        rows = [p + a[:-1] for p, a in zip(prompts, answers, strict=True)]
        inputs = self._left_padded(rows)
        window = max(len(answer) for answer in answers)
        targets = torch.full((len(rows), window), IGNORED)  # [B, A]
        for row, answer in enumerate(answers):
            targets[row, window - len(answer) :] = torch.tensor(answer)
        logits = self.model(**inputs, logits_to_keep=window, use_cache=False).logits  # [B, A, V]
        targets = targets.to(logits.device)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        return loss, sum(len(row) for row in rows)

    @torch.no_grad()
    def score(self, task: Task, *, batch_size: int = 24) -> Score:
        """`generated`: greedy decoding writes the label and then stops. `among_labels`: the label
        has the largest total log-probability of all label tokens and the terminator."""
        was_training = self.model.training
        self.model.eval()
        # Rows of similar length share a batch: less padding.
        examples = sorted(task.test, key=lambda example: len(self.prompt_ids(example.text, task)))
        generated = among = 0
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            log_probability, greedy = self._score_labels(batch, task)  # [B, L] each
            gold = torch.tensor([task.labels.index(example.label) for example in batch])
            generated += int(greedy[torch.arange(len(batch)), gold].sum())
            among += int((log_probability.argmax(dim=1) == gold).sum())
        self.model.train(was_training)
        return Score(generated / len(examples), among / len(examples))

    def _score_labels(
        self, batch: Sequence[Example], task: Task
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of every label's answer, and whether greedy decoding writes it: [B, L].

        The prompts run once; all labels then continue from their key-value cache.
        """
        inputs = self._left_padded([self.prompt_ids(example.text, task) for example in batch])
        output = self.model(**inputs, logits_to_keep=1, use_cache=True)
        answers = [self.answer_ids(label) for label in task.labels]
        n_labels, width = len(answers), max(len(answer) for answer in answers)
        continuation = torch.zeros(n_labels, width - 1, dtype=torch.long)  # [L, A-1]
        targets = torch.zeros(n_labels, width, dtype=torch.long)  # [L, A]
        mask = torch.zeros(n_labels, width, dtype=torch.bool)  # [L, A]
        for row, answer in enumerate(answers):
            continuation[row, : len(answer) - 1] = torch.tensor(answer[:-1])
            targets[row, : len(answer)] = torch.tensor(answer)
            mask[row, : len(answer)] = True
        device = output.logits.device
        continuation, targets, mask = (t.to(device) for t in (continuation, targets, mask))

        n_rows = len(batch)
        cache = output.past_key_values
        cache.batch_repeat_interleave(n_labels)
        seen = inputs["attention_mask"].repeat_interleave(n_labels, dim=0)  # [B*L, P]
        more = mask[:, 1:].repeat(n_rows, 1).to(seen.dtype)  # [B*L, A-1]
        steps = torch.arange(width - 1, device=device)
        after = self.model(
            input_ids=continuation.repeat(n_rows, 1),
            attention_mask=torch.cat([seen, more], dim=1),
            position_ids=seen.sum(dim=1, keepdim=True) + steps,
            past_key_values=cache,
            use_cache=True,
        ).logits.unflatten(0, (n_rows, n_labels))  # [B, L, A-1, V]
        first = output.logits[:, None].expand(-1, n_labels, -1, -1)  # [B, L, 1, V]
        logits = torch.cat([first, after], dim=2).float()  # [B, L, A, V]
        wanted = targets.expand(n_rows, -1, -1)  # [B, L, A]
        chosen = logits.log_softmax(dim=-1).gather(-1, wanted[..., None])[..., 0]
        log_probability = chosen.masked_fill(~mask, 0.0).sum(dim=-1)
        greedy = ((logits.argmax(dim=-1) == wanted) | ~mask).all(dim=-1)
        return log_probability.cpu(), greedy.cpu()

    def _left_padded(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), int(self.tokenizer.eos_token_id))
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, width - len(row) :] = torch.tensor(row)
            mask[index, width - len(row) :] = 1
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        device = next(self.model.parameters()).device
        return {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            "position_ids": positions.to(device),
        }

    def _ids(self, text: str, at_most: int | None = None) -> list[int]:
        cut = {} if at_most is None else {"truncation": True, "max_length": at_most}
        return list(self.tokenizer(text, add_special_tokens=False, **cut)["input_ids"])

    def _leading_specials(self) -> list[int]:
        plain = self._ids("a")
        decorated = list(self.tokenizer("a")["input_ids"])
        for start in range(len(decorated) - len(plain) + 1):
            if decorated[start : start + len(plain)] == plain:
                return decorated[:start]
        return []
