"""Text that a model writes by itself, from its first token on, as rows to be protected."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sculpt.curvature.padding import IGNORED

ROWS = 8
"""That are written at once, at least."""


def written_by(
    model: nn.Module, tokenizer: Any, tokens: int, length: int, seed: int, processes: int = 1
) -> list[dict[str, Tensor]]:
    """Batches of rows with labels, of at least `tokens` tokens together.

    Each row is drawn from the model's own distribution, at temperature 1, and ends with its
    end-of-sequence token or after `length` tokens. A batch has a row for each of the processes.

    Raises:
        TypeError, ValueError: the model does not generate, or the tokenizer has no token to begin
            with.
    """
    config = getattr(model, "config", None)
    if not callable(getattr(model, "generate", None)) or getattr(
        config, "is_encoder_decoder", False
    ):
        raise TypeError(
            f"protect_generated needs a causal language model; got {type(model).__name__}"
        )
    for name, value in (("tokens", tokens), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1; got {value!r}")
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and length >= longest:
        raise ValueError(
            f"length={length} and a token to begin with are more than the {longest} positions of "
            "the model; take a smaller length"
        )
    rows = ROWS * math.ceil(processes / ROWS)
    end = tokenizer.eos_token_id
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if begin is None:
        raise ValueError("the tokenizer has no beginning-of-text and no end-of-text token")
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    batches: list[dict[str, Tensor]] = []
    written = 0
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            while written < tokens:
                start = torch.full((rows, 1), int(begin), device=device)
                ids = model.generate(  # type: ignore[operator]
                    start,
                    attention_mask=torch.ones_like(start),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    # What its own settings may have.
                    typical_p=1.0,
                    min_p=0.0,
                    num_beams=1,
                    repetition_penalty=1.0,
                    no_repeat_ngram_size=0,
                    max_new_tokens=length,
                    pad_token_id=begin if end is None else end,
                )
                mask = torch.ones_like(ids)
                if end is not None:
                    ended = (ids[:, 1:] == end).cumsum(dim=1)
                    mask[:, 2:] = (ended[:, :-1] == 0).long()
                labels = torch.where(mask.bool(), ids, IGNORED)
                batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
                written += int(mask[:, 1:].sum())
    finally:
        for module, mode in modes.items():
            module.training = mode
    return batches


def share_of_distinct(batches: list[dict[str, Tensor]], n: int = 4) -> float:
    """Distinct runs of `n` tokens over all of them: near 0 for text that repeats itself."""
    runs: set[tuple[int, ...]] = set()
    total = 0
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            row = ids[mask.bool()].tolist()
            runs.update(found := [tuple(row[i : i + n]) for i in range(len(row) - n + 1)])
            total += len(found)
    return len(runs) / total if total else 1.0
