"""A tiny random causal language model with a word tokenizer, as a user might have one."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sculpt.data.examples import Example, Task

TEXT = """the a film song is was very quite good bad long short news about money games computers
Verdict : Topic Sentiment business entertainment politics sports tech negative neutral positive
fresh rotten people say that this it and of in to for with on he she they"""
WORDS = TEXT.split()
END, UNKNOWN = "<end>", "<unk>"


def tiny_tokenizer(around: str | None = None) -> Any:
    """One token for each word; pads with the end-of-sequence token, as many models do.

    around: what the tokenizer adds to a text `$A`; nothing by default.
    """
    vocabulary = {word: index for index, word in enumerate([END, UNKNOWN, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if around is not None:
        special = [(END, 0), (UNKNOWN, 1)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=special
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token=UNKNOWN
    )


def tiny_model(seed: int = 0) -> Any:
    """Two Llama layers, 32 wide, far enough from zero that answers differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def task(
    name: str, suffix: str, train: dict[str, str], test: dict[str, str], labels: tuple[str, ...]
) -> Task:
    """Texts with their labels, asked by `suffix`."""
    splits = [[Example(text, label, suffix) for text, label in s.items()] for s in (train, test)]
    return Task(name, *splits, labels)


# Two labels start with the same token; they differ in length from those of SHORT.
VERY = task(
    "very",
    " Verdict :",
    {
        "the film is good": "very good",
        "a song was bad and they say that it is long": "very bad",
        "it is": "quite",
        "people say the news is good": "very good",
    },
    {
        "this film was good": "very good",
        "the bad song": "very bad",
        "he and she say that this is a long and very bad film": "very bad",
        "news": "quite",
        "money games computers": "quite",
    },
    ("very good", "very bad", "quite"),
)
SHORT = task(
    "short",
    " Topic :",
    {
        "money for people": "business",
        "they say computers": "tech",
        "the money is good": "business",
        "computers on computers and games": "tech",
    },
    {"money": "business", "computers in games": "tech"},
    ("business", "tech"),
)
