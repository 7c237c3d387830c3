"""From a model directory to a learner."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sculpt.data.examples import Task
from sculpt.models.directory import check_directory
from sculpt.models.learner import Learner

KINDS = ("causal", "seq2seq", "classification", "nearest")


def kind_of(path: Path) -> str:
    """Which learner suits the directory, by its `config.json`.

    Raises `ValueError` where that file is missing or names none of the architectures known here.
    """
    check_directory(path)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model={path}: config.json is not JSON: {error}") from None
    names = config.get("architectures") or []
    if config.get("is_encoder_decoder"):
        return "seq2seq"
    for ending, kind in (
        ("ForCausalLM", "causal"),
        ("LMHeadModel", "causal"),
        ("ForSequenceClassification", "classification"),
    ):
        if any(name.endswith(ending) for name in names):
            return kind
    raise ValueError(
        f"model={path}: architectures={names} does not tell how it answers; "
        f"set model_kind to one of {', '.join(KINDS)}"
    )


def load_learner(
    kind: str, path: Path, tasks: Sequence[Task], *, dtype: str = "float32", **options: Any
) -> Learner:
    """Load the model at `path`. `kind` is "auto" or one of `KINDS`; `options` are the learner's.

    Raises `ValueError` for a directory that does not hold such a model.
    """
    from sculpt.models.causal import CausalLearner
    from sculpt.models.classifying import ClassificationLearner
    from sculpt.models.encoder import EncoderLearner
    from sculpt.models.seq2seq import Seq2SeqLearner

    kind = kind_of(path) if kind == "auto" else kind
    if options.get("packing") and kind != "causal":
        raise ValueError(f"training.packing needs a causal language model; {path} is {kind}")
    if kind != "causal":
        options.pop("packing", None)
    if kind not in ("causal", "seq2seq"):
        options.pop("max_new_tokens", None)
    weights = getattr(torch, dtype)
    match kind:
        case "causal":
            return CausalLearner.from_directory(path, dtype=weights, **options)
        case "seq2seq":
            return Seq2SeqLearner.from_directory(path, dtype=weights, **options)
        case "classification":
            return ClassificationLearner.from_directory(path, tasks, dtype=weights, **options)
        case _:
            return EncoderLearner.from_directory(path, tasks, dtype=weights, **options)
