"""A tiny model and tiny tasks in the folders of task orders 1 to 3, for rehearsals anywhere."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

LABELS = {
    "dbpedia": ("Company", "Artist", "Plant"),
    "amazon": ("negative", "neutral", "positive"),
    "yahoo": ("Health", "Sports"),
    "agnews": ("World", "Sports", "Business"),
}
TEXT = "a the one two of in and to for with on very quite new old red blue up down"
WORDS = tuple(TEXT.split())


def tiny_data(folder: Path, *, rows: int = 24) -> Path:
    """Rows whose first words tell their label, as prompts with a line of options."""
    rng = random.Random(0)
    for task, labels in LABELS.items():
        (folder / task).mkdir(parents=True)
        (folder / task / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
        for split in ("train", "test"):
            written = []
            for number in range(rows):
                answer = labels[number % len(labels)]
                text = " ".join([WORDS[number % len(labels)], *rng.choices(WORDS, k=5)])
                prompt = f"Choose one.\nOption: {', '.join(labels)} \n{text}\nAnswer:"
                written.append({"prompt": prompt, "answer": answer})
            (folder / task / f"{split}.json").write_text(json.dumps(written), encoding="utf-8")
    return folder


def tiny_model(folder: Path) -> Path:
    """A Llama of two layers, 32 wide, with a word tokenizer, as a plain directory."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {*WORDS, *(label for labels in LABELS.values() for label in labels)}
    words |= {"Choose", "Option", "Answer", ":", ",", "."}
    vocabulary = {word: place for place, word in enumerate(["<end>", "<unk>", *sorted(words)])}
    tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=0,
        pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
