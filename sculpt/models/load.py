"""Load a learner: the kind of model that a directory holds, its weights and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sculpt.messages import nearest

if TYPE_CHECKING:
    from sculpt.data.examples import Task
    from sculpt.models.learner import Learner

KINDS = ("causal", "seq2seq", "classification", "nearest")
GGUF = (
    "GGUF files hold quantised weights, which cannot take an exact update. Convert it once: "
    "AutoModelForCausalLM.from_pretrained(directory, gguf_file=name).save_pretrained(new)"
)


def check_directory(path: Path) -> None:
    """Raise `ValueError` unless `path` is a Hugging Face model directory on this machine."""
    name = f"model={str(path)!r}"
    if (path / "config.json").is_file():
        return
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        raise ValueError(f"{name}: {GGUF}")
    if not path.exists():
        raise ValueError(f"{name} does not exist{_nearby(path)}")
    if not path.is_dir():
        raise ValueError(f"{name} is a file; expected a Hugging Face model directory")
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{name} is a PEFT adapter, not a model; merge it into its base (merge_and_unload) and "
            "save that"
        )
    inside = sorted(child.name for child in path.iterdir())[:8]
    raise ValueError(
        f"{name} has no config.json; expected a Hugging Face model directory, found "
        f"{', '.join(inside) or 'nothing'}"
    )


def _nearby(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    wrong, *rest = path.relative_to(parent).parts
    close = nearest(wrong, [child.name for child in parent.iterdir()])
    if close is not None:
        whole = parent.joinpath(close, *rest)
        return f"; did you mean {str(whole if whole.exists() else parent / close)!r}?"
    return "; expected a Hugging Face model directory on this machine"


def quiet_transformers() -> None:
    """Keep what transformers prints while it loads to itself."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_pretrained(
    auto_class: str, path: Path, dtype: torch.dtype, **options: Any
) -> tuple[Any, Any]:
    """Model and tokenizer of a directory, by the `AutoModel` class of that name.

    Raises `ValueError` when the directory does not hold such a model.
    """
    import transformers

    check_directory(path)
    try:
        model = getattr(transformers, auto_class).from_pretrained(path, dtype=dtype, **options)
    except Exception as error:  # whatever is wrong with the files, in any of several libraries
        raise ValueError(f"model={path}: {auto_class} cannot read it: {error}") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise ValueError(
            f"model={path}: no tokenizer can be read there (tokenizer.json, ...): {error}"
        ) from error
    return model.eval(), tokenizer


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
    kind: str,
    path: Path,
    tasks: Sequence[Task],
    *,
    dtype: str = "float32",
    packing: bool = False,
    max_new_tokens: int = 64,
    **options: Any,
) -> Learner:
    """Load the model at `path`. `kind` is "auto" or one of `KINDS`; `options` are the learner's.

    Raises `ValueError` for a directory that does not hold such a model.
    """
    from sculpt.models.causal import CausalLearner
    from sculpt.models.classifying import ClassificationLearner, NearestLabelLearner
    from sculpt.models.seq2seq import Seq2SeqLearner

    kind = kind_of(path) if kind == "auto" else kind
    if packing and kind != "causal":
        raise ValueError(f"training.packing needs a causal language model; {path} is {kind}")
    options["dtype"] = getattr(torch, dtype)
    match kind:
        case "causal":
            options |= {"packing": packing, "max_new_tokens": max_new_tokens}
            return CausalLearner.from_directory(path, **options)
        case "seq2seq":
            return Seq2SeqLearner.from_directory(path, max_new_tokens=max_new_tokens, **options)
        case "classification":
            return ClassificationLearner.from_directory(path, tasks, **options)
        case _:
            return NearestLabelLearner.from_directory(path, tasks, **options)
