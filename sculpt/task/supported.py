"""Which models and layers can be sculpted: why the others cannot, and what to do about it."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from sculpt.distributed.sharding import sharded_modules, why_not_divided
from sculpt.task.guards import is_held
from sculpt_kernels import is_divided

# Layers of other packages that keep their weights in a quantised form of their own.
QUANTISED = ("bitsandbytes", "hqq", "gptqmodel", "awq", "auto_gptq", "optimum.quanto", "torchao")
# Modules and parameters of low-rank adapters, as PEFT and others name them.
ADAPTER = re.compile(r"lora_(a|b|embedding_a|embedding_b|down|up|magnitude_vector)", re.IGNORECASE)
# By the module of the hook that computes the weight: what does so, and how it is ended.
COMPUTED = {
    "torch.nn.utils.weight_norm": ("weight_norm", "torch.nn.utils.remove_weight_norm"),
    "torch.nn.utils.spectral_norm": ("spectral_norm", "torch.nn.utils.remove_spectral_norm"),
    "torch.nn.utils.prune": ("pruning", "torch.nn.utils.prune.remove"),
}


def refuse_model(model: nn.Module) -> None:
    """Refuse a model in which no task can begin as it is, by name.

    Raises:
        RuntimeError: a task is running in it.
        ValueError: weights are hidden, without values or quantised, or it carries adapters.
    """
    _refuse_running(model)
    refuse_hidden_weights(model)
    _refuse_quantised(model)
    _refuse_adapters(model)


def _refuse_running(model: nn.Module) -> None:
    """Two tasks in one model would take each other's weights for those before the task."""
    for path, module in model.named_modules():
        if is_held(module) or "sculpt" in vars(module):
            raise RuntimeError(
                f"a task is running in {path or 'model'!r} ({type(module).__name__}), or was when "
                "it was copied: call end_task() of its Sculptor first, or sculpt.abandon(model), "
                "which goes back to the weights before the task"
            )


def _refuse_quantised(model: nn.Module) -> None:
    way_out = (
        "load the model unquantised, or dequantise it (model.dequantize() for bitsandbytes), copy "
        "its state into a fresh model of the same configuration, and sculpt that"
    )
    for path, module in model.named_modules():
        package = type(module).__module__
        if package.startswith(tuple(f"{name}." for name in QUANTISED)):
            raise ValueError(
                f"{path!r} is a {type(module).__name__} of {package.split('.')[0]}: quantised "
                f"weights cannot take an exact update; {way_out}"
            )
        config = getattr(module, "config", None)
        quantised = getattr(config, "quantization_config", None)
        if quantised is not None:
            about = quantised if isinstance(quantised, dict) else vars(quantised)
            method = about.get("quant_method", "unknown method")
            method = getattr(method, "value", method)
            raise ValueError(
                f"the model was loaded with a quantization_config ({method}) and would be saved as "
                f"a quantised one: {way_out}"
            )


def _refuse_adapters(model: nn.Module) -> None:
    for path, module in model.named_modules():
        kind = type(module).__name__
        if any(base.__module__.split(".")[0] == "peft" for base in type(module).__mro__):
            raise ValueError(
                f"{path or 'model'} ({kind}) is of PEFT: adapters are not sculpted, and the "
                f"weights under them are frozen. {_without_adapters(module)}, then "
                "model.requires_grad_(True). A trainer takes no peft_config"
            )
        named = [path.rpartition(".")[2], *(name for name, _ in module.named_parameters("", False))]
        adapter = next(filter(ADAPTER.fullmatch, named), None)
        if adapter is not None:
            raise ValueError(
                f"{path or 'model'} ({kind}) has the adapter {adapter!r}: adapters are not "
                "sculpted. Merge it into its weight and put the plain layer back first"
            )


def _without_adapters(module: nn.Module) -> str:
    """How a plain model is made of one with adapters of PEFT."""
    if callable(getattr(module, "merge_and_unload", None)):
        return "Merge them first, model = model.merge_and_unload()"
    if callable(getattr(module, "get_base_model", None)):
        return "Take the model without them, model = model.get_base_model()"
    return (
        "Merge them first (delete_adapter() leaves their layers behind): with the adapters that "
        "model.save_pretrained(folder) writes, "
        "model = PeftModel.from_pretrained(plain_model, folder).merge_and_unload()"
    )


def computed_weights(module: nn.Module) -> dict[str, str]:
    """Weights that the module computes from other parameters, by name: how, and the way out."""
    found = {}
    if parametrize.is_parametrized(module):
        steps: Any = module.parametrizations
        for name in steps:
            kinds = ", ".join(type(step).__name__ for step in steps[name])
            way_out = "torch.nn.utils.parametrize.remove_parametrizations"
            found[name] = f"a parametrization ({kinds})", way_out
    for hook in module._forward_pre_hooks.values():
        for base in type(hook).__mro__:
            if base.__module__ in COMPUTED:
                name = vars(hook).get("name", vars(hook).get("_tensor_name"))
                found[str(name)] = COMPUTED[base.__module__]
    return {
        name: f"its {name} is computed from other parameters by {what}; "
        f"{way_out}(module, {name!r}) makes it a plain one"
        for name, (what, way_out) in found.items()
        if not is_bias(name)
    }


def why_no_matrix(module: nn.Module) -> str:
    """Why a module has no weight to sculpt."""
    reasons = (
        why_not_alone(module, name, value)
        for name, value in module.named_parameters("", recurse=False)
    )
    kind = type(module).__name__
    return next(
        filter(None, reasons), f"{kind} has no weight that is a matrix or a stack of matrices"
    )


def why_not_alone(module: nn.Module, parameter: str, value: Tensor) -> str | None:
    """Why a matrix that is not the `weight` of a layer cannot be sculpted; None for the others."""
    kind = type(module).__name__
    if parameter == "weight" or value.ndim < 2 or is_bias(parameter):
        return None
    if isinstance(module, nn.MultiheadAttention) and parameter == "in_proj_weight":
        return (
            f"{parameter} holds three matrices, for queries, keys and values, in one parameter "
            f"that {kind} reads by itself; its out_proj can be sculpted"
        )
    return (
        f"{parameter} is a parameter that {kind} reads by itself; the weights of layers, and "
        "stacks of matrices, can be sculpted"
    )


def is_bias(parameter: str) -> bool:
    return parameter.startswith("bias") or parameter.endswith("bias")


def why_not_stored(weight: Tensor) -> str | None:
    """Why a weight that is stored like this cannot be sculpted, or None if it can."""
    if is_divided(weight):
        reason = why_not_divided(weight)
        if reason is not None:
            return reason
    elif type(weight) not in (nn.Parameter, FakeTensor):  # Shapes without values will do.
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if not torch.is_floating_point(weight):
        return f"its weight is {weight.dtype}, not a floating dtype"
    if weight.device.type == "meta":
        return "its weight is on the meta device and has no values"
    return None


def why_not_used(module: nn.Module, weight: Tensor) -> str | None:
    """Why the weight cannot be sculpted where the module uses it, or None if it can."""
    kind = type(module).__name__
    if isinstance(module, nn.modules.conv._ConvNd) or weight.ndim > 3:
        return f"{kind} has a weight of shape {tuple(weight.shape)}, which is not a matrix"
    if min(weight.shape[-2:]) < 2:
        return f"its weight {tuple(weight.shape)} has too few directions to preserve and train"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        for option in ("max_norm", "sparse", "scale_grad_by_freq"):
            if getattr(module, option):
                return f"{kind} with {option}={getattr(module, option)} is not supported"
    return None


WRAP_LATER = (
    "call begin_task() on the plain model first, then wrap it, DistributedDataParallel(model); "
    "every task takes a new wrapper"
)


def refuse_hidden_weights(model: nn.Module) -> None:
    """Refuse what leaves the modules without the values of their weights, by name.

    Raises:
        ValueError: the model is inside of such a wrapper.
    """
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind == "DistributedDataParallel":
            raise ValueError(
                f"{path or 'model'} is a DistributedDataParallel, which averages the gradients "
                f"that trained when it was made: {WRAP_LATER}"
            )
        if kind == "FullyShardedDataParallel":
            raise ValueError(
                f"{path or 'model'} is a FullyShardedDataParallel (FSDP1), which flattens matrices "
                "away; use torch.distributed.fsdp.fully_shard (FSDP2)"
            )
    by_fully_shard = bool(sharded_modules(model))
    for name, parameter in model.named_parameters():
        if is_divided(parameter) and not by_fully_shard:
            raise ValueError(
                f"{name} is divided, and no part of the model by fully_shard: tensor parallelism "
                "is not supported; use torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if is_lazy(parameter):
            raise ValueError(
                f"{name} is not initialised and takes its shape from the first batch: call the "
                "model once, then begin_task()"
            )
        if parameter.is_meta and not isinstance(parameter, FakeTensor):
            raise ValueError(
                f"{name} is on the meta device and has no values: after fully_shard, "
                "model.to_empty(device=...) and load the weights, then begin_task()"
            )
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"{name} is partitioned by DeepSpeed ZeRO-3, which leaves modules without their "
                "matrices; use torch.distributed.fsdp.fully_shard (FSDP2), or ZeRO-1 or ZeRO-2"
            )
