"""Whether a path is the directory of a model, and what it may be instead."""

from __future__ import annotations

from pathlib import Path

from sculpt.messages import nearest

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
