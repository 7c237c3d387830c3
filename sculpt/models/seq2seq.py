"""Encoder-decoder models (T5, BART): the encoder reads the question, the decoder answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sculpt.data.examples import DataError, Example, Task
from sculpt.models.answers import GenerativeLearner
from sculpt.models.encoding import IGNORED, Encoded
from sculpt.models.learner import Score, pad


class Seq2SeqLearner(GenerativeLearner):
    """A Hugging Face encoder-decoder with its tokenizer.

    Raises `ValueError` for a model without a decoder start token.
    """

    auto_class = "AutoModelForSeq2SeqLM"

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        start = model.generation_config.decoder_start_token_id
        start = model.config.decoder_start_token_id if start is None else start
        if start is None:
            raise ValueError(
                f"{type(model).__name__}: config.decoder_start_token_id is None, expected a token"
            )
        self.start = int(start)
        self._answers: dict[str, tuple[int, ...]] = {}

    def encode(self, example: Example) -> Encoded:
        asked = self.encoder.prompt(example)
        return Encoded(asked.ids, self._answer(example, example.answer), asked.cut)

    def loss(self, rows: Sequence[Encoded]) -> tuple[Tensor, int]:
        """Mean cross-entropy over all tokens of all answers, terminators included."""
        inputs = self.padded([row.ids for row in rows], self.end)
        decoder, targets = self._decoder([row.labels for row in rows])
        logits = self.model(
            **inputs,
            decoder_input_ids=decoder,
            # Nothing that is learned depends on it; it says what is padding.
            decoder_attention_mask=(targets != IGNORED).long(),
            use_cache=False,
        ).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        return loss, sum(len(row.ids) + len(row.labels) for row in rows)

    def _question(self, example: Example) -> tuple[int, ...]:
        return self.encoder.prompt(example).ids

    def _answer(self, example: Example, label: str) -> tuple[int, ...]:
        if label not in self._answers:
            # The tokenizer's own trailing tokens end the answer; T5 and BART have one.
            ids = (*self.encoder.leading, *self.encoder.plain(label), self.end)
            self._answers[label] = ids
        return self._answers[label]

    def _documents(self, task: Task) -> Score:
        raise DataError(f"task {task.name!r}: documents need a causal language model")

    def _write(self, questions: Sequence[Sequence[int]]) -> list[list[int]]:
        # The first token is the one that starts the decoder.
        return [row[1:] for row in self._generate(self.padded(questions, self.end))]

    def _label_logits(
        self, questions: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]
    ) -> Tensor:
        """The encoder runs once for all labels."""
        from transformers.modeling_outputs import BaseModelOutput

        inputs = self.padded(questions, self.end)
        read = self.model.get_encoder()(**inputs).last_hidden_state  # [B, T, d]
        n_labels = len(answers[0])
        decoder, _ = self._decoder([answer for row in answers for answer in row])
        logits: Tensor = self.model(
            encoder_outputs=BaseModelOutput(read.repeat_interleave(n_labels, dim=0)),
            attention_mask=inputs["attention_mask"].repeat_interleave(n_labels, dim=0),
            decoder_input_ids=decoder,
            use_cache=False,
        ).logits
        return logits.view(len(answers), n_labels, *logits.shape[1:])

    def _decoder(self, answers: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """What the decoder reads, the answer shifted by one, and what it should write: [B, A]."""
        read = pad([[self.start, *answer[:-1]] for answer in answers], self.end)
        return read.to(self.device), pad(answers, IGNORED).to(self.device)
