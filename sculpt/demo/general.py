"""Loss on text that has nothing to do with the tasks: what the model could do before them."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F

from sculpt.models.load import load_pretrained, quiet_transformers

GENERAL = "loss on general text"
ROWS, TOKENS = 24, 128


@torch.no_grad()
def general_loss(path: Path, *, encoder: bool) -> float:
    """Mean loss of the model at `path` on the beginnings of topics of Python's language reference.

    Of a causal language model: of each next token. Of an encoder: of finding the second half of
    each text by the first.
    """
    quiet_transformers()
    auto_class = "AutoModel" if encoder else "AutoModelForCausalLM"
    model, tokenizer = load_pretrained(auto_class, path, torch.float32)
    cut = {"add_special_tokens": False, "truncation": True, "max_length": TOKENS}
    texts = [tokenizer(topics[name], **cut).input_ids for name in sorted(topics)]
    rows = torch.tensor([ids for ids in texts if len(ids) == TOKENS][:ROWS])
    if not encoder:
        losses = [model(part, labels=part).loss for part in torch.split(rows, 8)]
        return float(torch.stack(losses).mean())
    first, second = (
        F.normalize(model(half).last_hidden_state.mean(dim=1), dim=-1)
        for half in rows.chunk(2, dim=1)
    )
    return float(F.cross_entropy(20 * first @ second.T, torch.arange(len(rows))))
