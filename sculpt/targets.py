"""Which matrices of a model are sculpted, and why the others are not."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sculpt.config import SculptConfig
from sculpt.distributed.refusals import refuse_hidden_weights
from sculpt.distributed.sharding import why_not_divided
from sculpt.ranks import preserved_rank
from sculpt.standing import is_held
from sculpt_kernels import is_divided

# Layers of other packages that keep their weights in a quantised form of their own.
QUANTISED = ("bitsandbytes", "hqq", "gptqmodel", "awq", "auto_gptq", "optimum.quanto", "torchao")


@dataclass(frozen=True)
class Place:
    """Where a weight is used: a module and the name of one of its parameters.

    `transposed`: the module stores it as `in x out`, as GPT-2's `Conv1D` does.
    """

    path: str
    module: nn.Module
    parameter: str
    transposed: bool

    @property
    def weight(self) -> nn.Parameter:
        weight = self.module._parameters[self.parameter]
        assert weight is not None
        return weight

    @property
    def name(self) -> str:
        """The module, and the parameter where a module may have several matrices."""
        return self.path if self.parameter == "weight" else f"{self.path}.{self.parameter}"


@dataclass(frozen=True)
class Target:
    """One weight to sculpt: an `m x n` matrix, or a stack of them, and its preserved rank `h`.

    Attributes:
        places: the modules that use it; several where it is tied.
    """

    places: tuple[Place, ...]
    preserved: int

    @property
    def name(self) -> str:
        return self.places[0].name

    @property
    def parameter(self) -> nn.Parameter:
        return self.places[0].weight

    def oriented(self, stored: Tensor) -> Tensor:
        """A tensor laid out as the weight, seen as `(..., out, in)`."""
        return stored.mT if self.places[0].transposed else stored

    @property
    def shape(self) -> tuple[int, ...]:
        """`(m, n)`, out x in; `(count, m, n)` for a stack."""
        return tuple(self.oriented(self.parameter).shape)

    @property
    def trainable_rank(self) -> int:
        return min(self.shape[-2:]) - self.preserved


@dataclass(frozen=True)
class Targets:
    """The chosen matrices, and every parameter that was left out with the reason."""

    chosen: list[Target]
    left_out: dict[str, str]


def find_targets(model: nn.Module, config: SculptConfig) -> Targets:
    """Match `config.target_modules` against the model by PEFT's rules.

    Raises:
        ValueError: nothing matches, a named module is of a kind that cannot be sculpted, or a rank
            does not fit its matrix.
        RuntimeError: a task is running in the model.
    """
    _refuse_running(model)
    refuse_hidden_weights(model)
    _refuse_quantised(model)
    wanted, refused = _wanted(model, config.target_modules)
    users = _users(model)
    chosen: dict[int, Target] = {}
    for place in wanted:
        weight = place.weight
        if id(weight) in chosen:
            continue
        places = (place, *(other for other in users[id(weight)] if other.name != place.name))
        reason = next(filter(None, (_refusal(other) for other in places)), None)
        if reason is not None:
            refused[place.name] = reason
            continue
        shape = place.weight.shape[-2:]
        preserved = preserved_rank(place.name, (shape[0], shape[1]), config)
        chosen[id(weight)] = Target(places, preserved)
    if refused and (not chosen or config.target_modules != "all-linear"):
        name, reason = next(iter(refused.items()))
        raise ValueError(
            f"target_modules={config.target_modules!r} matches {name!r}, which cannot be "
            f"sculpted: {reason}"
        )
    if not chosen:
        raise ValueError(
            f"target_modules={config.target_modules!r} matches nothing; "
            f"the model's linear layers end in {_linear_suffixes(model)}"
        )
    taken = {place.name for target in chosen.values() for place in target.places}
    return Targets(list(chosen.values()), _left_out(model, taken, refused))


def _wanted(model: nn.Module, targets: str | Sequence[str]) -> tuple[list[Place], dict[str, str]]:
    """Weights that the request names, in the model's order; names without one, with the reason."""
    found: list[Place] = []
    refused: dict[str, str] = {}
    heads = _heads(model)
    for path, module in model.named_modules():
        matrices = list(_matrices(path, module))
        if targets == "all-linear":
            found += [place for place in matrices if _is_linear(place) and module not in heads]
        elif matches(path, targets):
            found += matrices
            if not matrices:
                kind = type(module).__name__
                refused[path] = f"{kind} has no weight that is a matrix or a stack of matrices"
        else:
            found += [place for place in matrices if matches(place.name, targets)]
    return found, refused


def matches(name: str, targets: str | Sequence[str]) -> bool:
    """PEFT's rules: a regular expression for the whole name, or a list of suffixes."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in targets)


def _matrices(path: str, module: nn.Module) -> Iterator[Place]:
    """The module's own parameters that may be a target: its weight, or a stack of matrices."""
    for parameter, value in module.named_parameters(recurse=False, remove_duplicate=False):
        if (parameter == "weight" and value.ndim >= 2) or (
            value.ndim == 3 and min(value.shape[-2:]) > 1
        ):
            yield _place(path, module, parameter)


def _place(path: str, module: nn.Module, parameter: str) -> Place:
    return Place(path, module, parameter, transposed=_is_conv1d(module))


def _is_conv1d(module: nn.Module) -> bool:
    """By name: the class is in transformers, which need not be imported for this."""
    return type(module).__name__ == "Conv1D"


def _is_linear(place: Place) -> bool:
    """What `"all-linear"` takes: linear layers, and the matrices of a mixture of experts."""
    if place.parameter == "weight":
        return isinstance(place.module, nn.Linear) or _is_conv1d(place.module)
    return type(place.module).__name__.endswith("Experts")


def _users(model: nn.Module) -> dict[int, list[Place]]:
    """Every use of each weight."""
    users: dict[int, list[Place]] = defaultdict(list)
    for path, module in model.named_modules():
        for parameter, value in module.named_parameters(recurse=False, remove_duplicate=False):
            users[id(value)].append(_place(path, module, parameter))
    return users


def _refusal(place: Place) -> str | None:
    """Why the weight cannot be sculpted where it is used, or None if it can."""
    weight, module = place.weight, place.module
    kind = type(module).__name__
    if isinstance(module, nn.modules.conv._ConvNd) or weight.ndim > 3:
        return f"{kind} has a weight of shape {tuple(weight.shape)}, which is not a matrix"
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
    if min(weight.shape[-2:]) < 2:
        return f"its weight {tuple(weight.shape)} has too few directions to preserve and train"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        for option in ("max_norm", "sparse", "scale_grad_by_freq"):
            if getattr(module, option):
                return f"{kind} with {option}={getattr(module, option)} is not supported"
    return None


def _refuse_running(model: nn.Module) -> None:
    """Two tasks in one model would take each other's weights for those before the task."""
    for path, module in model.named_modules():
        if is_held(module) or "sculpt" in vars(module):
            raise RuntimeError(
                f"a task is running in {path or 'model'!r} ({type(module).__name__}), or was when "
                "it was copied: call end_task() of its Sculptor first"
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


def _left_out(model: nn.Module, taken: set[str], refused: dict[str, str]) -> dict[str, str]:
    heads = _heads(model)
    reasons = {}
    for full, _ in model.named_parameters(remove_duplicate=False):
        path, _, parameter = full.rpartition(".")
        name = path if parameter == "weight" else full
        if name not in taken:
            module = model.get_submodule(path)
            reasons[full] = refused.get(name) or _why_not(module, parameter, heads)
    return reasons


def _why_not(module: nn.Module, parameter: str, heads: dict[nn.Module, str]) -> str:
    if module in heads and parameter == "weight":
        return heads[module]
    if parameter.endswith("bias"):
        return "bias: only matrices are sculpted"
    if isinstance(module, nn.Linear) or _is_conv1d(module):
        return "not in target_modules"
    return f"{type(module).__name__}: not in target_modules"


def _heads(model: nn.Module) -> dict[nn.Module, str]:
    """What the model, or the one in a wrapper, answers through, by its kind."""
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if not callable(getter):
            continue
        head = getter()
        if isinstance(head, nn.Module):
            return {head: "output embedding"}
        # A classification head is what a model has beside its base model.
        inside = {module, *getattr(module, "base_model", module).modules()}
        return {part: "classification head" for part in module.modules() if part not in inside}
    return {}


def _linear_suffixes(model: nn.Module) -> str:
    places = (place for path, module in model.named_modules() for place in _matrices(path, module))
    return ", ".join(sorted({p.name.rpartition(".")[2] for p in places if _is_linear(p)})) or (
        "nothing"
    )
