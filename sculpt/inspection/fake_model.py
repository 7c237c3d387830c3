"""Build a model without values from its configuration, and a batch of inputs and its loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sculpt.models.load import check_directory

MORE = "sculpt_maskless_sdpa"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: its configuration, and its directory if it has one."""

    name: str
    config: Any
    directory: Path | None

    @property
    def kind(self) -> str:
        """Name of the model class."""
        return str((getattr(self.config, "architectures", None) or ["AutoModel"])[0])


def find_source(model: Any) -> Source:
    """Read the configuration of `model`: a directory, a `config.json`, or a configuration object.

    Raises:
        ValueError: there is none, or it describes weights that cannot be sculpted; the message says
            what is there and what to do.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(model, PreTrainedConfig):
        return _checked(Source(type(model).__name__, model, None))
    path = Path(model)
    if not (path.is_file() and path.suffix == ".json"):
        check_directory(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"model={str(path)!r}: its configuration cannot be read: {error}"
        ) from error
    directory = path if path.is_dir() else path.parent
    return _checked(Source(directory.resolve().name, config, directory))


def _checked(source: Source) -> Source:
    quantised = getattr(source.config, "quantization_config", None)
    if quantised is not None:
        settings = quantised if isinstance(quantised, dict) else vars(quantised)
        method = settings.get("quant_method", "an unknown method")
        raise ValueError(
            f"model={source.name!r} holds weights quantised by {getattr(method, 'value', method)}, "
            "which cannot take an exact update; take the unquantised model, or dequantise it "
            "(model.dequantize()) and save that"
        )
    return source


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype that the configuration names, float32 if it names none."""
    dtype = getattr(source.config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def build(source: Source, dtype: torch.dtype, *, checkpointing: bool) -> nn.Module:
    """The model without values, its weights tied; to be used inside a `FakeTensorMode`.

    Raises:
        ValueError: transformers does not know the class, or cannot build it.
    """
    _register_attention()
    model = None
    for attention in (MORE, "eager"):
        try:
            # On the meta device first: some models compute with values while they are built.
            with unset_fake_temporarily(), torch.device("meta"):
                model = _construct(source, dtype=dtype, attn_implementation=attention)
            break
        except Exception as error:
            if attention == "eager":
                raise ValueError(
                    f"model={source.name!r}: {source.kind} cannot be built: {error}"
                ) from error
    assert model is not None
    model.to_empty(device="cpu")
    model.tie_weights()
    model.train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)()
    built: nn.Module = model
    return built


def _construct(source: Source, **options: Any) -> Any:
    import transformers

    kind = getattr(transformers, source.kind, None)
    if kind is None or source.kind == "AutoModel":
        return transformers.AutoModel.from_config(source.config, **options)
    return kind._from_config(source.config, **options)


def _register_attention() -> None:
    """The library's SDPA, without the mask it makes for tensors that have no values to look at."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(MORE, sdpa_attention_forward)
    AttentionMaskInterface.register(MORE, lambda *_, **__: None)


def training_batch(
    model: nn.Module, source: Source, batch: int, sequence: int
) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
    """Inputs of `batch` sequences, and the loss on them; inside a `FakeTensorMode`."""
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        size = getattr(source.config, "image_size", 224)
        size = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(source.config, "num_channels", 3)
        dtype = next(model.parameters()).dtype
        inputs = {name: torch.zeros(batch, channels, *size, dtype=dtype)}
    else:
        inputs = {name: torch.zeros(batch, sequence, dtype=torch.long)}
    language = any(part in source.kind for part in ("LM", "ConditionalGeneration"))
    if language:
        inputs["labels"] = torch.zeros(batch, sequence, dtype=torch.long)
    if language and getattr(source.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.zeros(batch, sequence, dtype=torch.long)

    def loss() -> Tensor:
        out = model(**inputs, **({"use_cache": False} if language else {}))
        value: Tensor = out.loss if language else out[0].float().square().mean()
        return value

    return inputs, loss
