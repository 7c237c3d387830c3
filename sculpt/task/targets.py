"""Which matrices of a model are sculpted, and why the others are not."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from sculpt.config import SculptConfig
from sculpt.task.patterns import (
    Patterns,
    match_any,
    matches,
    matches_end,
    names_of,
    no_match,
    split_targets,
    without_match,
)
from sculpt.task.ranks import preserved_rank
from sculpt.task.supported import (
    computed_weights,
    is_bias,
    refuse_model,
    why_no_matrix,
    why_not_alone,
    why_not_stored,
    why_not_used,
)

EXCLUDED = "in exclude_modules"
FROZEN = "frozen: requires_grad is False"


LOW_PRECISION = (torch.bfloat16, torch.float16)


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
        return names_of(self.path, self.parameter)[-1]


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


@dataclass(frozen=True)
class _Candidate:
    """A matrix that may be asked for.

    Attributes:
        names: see `names_of`.
        places: where it is used; nowhere if its module computes it from other parameters.
        linear: whether `"all-linear"` takes it.
        computed: how it is computed, and the way out.
        parts: with what the names of those other parameters begin.
    """

    names: tuple[str, ...]
    places: tuple[Place, ...]
    linear: bool
    computed: str = ""
    parts: tuple[str, ...] = ()

    @property
    def key(self) -> int | str:
        """The same for all names of a weight."""
        return id(self.places[0].weight) if self.places else self.names[-1]

    def why_not(self) -> str | None:
        """Why it cannot be sculpted, or None if it can."""
        if not self.places:
            return self.computed
        weight = self.places[0].weight
        reason = why_not_stored(weight)
        if reason is None and not weight.requires_grad:
            return FROZEN
        uses = (why_not_used(place.module, weight) for place in self.places)
        return reason or next(filter(None, uses), None)


def find_targets(model: nn.Module, config: SculptConfig) -> Targets:
    """Match `config.target_modules` against the model by PEFT's rules.

    What `config.exclude_modules` matches is left out, and so is what is frozen.

    Raises:
        ValueError: an entry matches nothing, a named module is of a kind that cannot be sculpted,
            nothing is left to train, or a rank does not fit its matrix.
        RuntimeError: a task is running in the model.
    """
    refuse_model(model)
    linear, named = split_targets(config.target_modules)
    heads = _heads(model)
    candidates = _candidates(model, heads)
    _check_named(model, candidates, named, config)
    _check_ranks(candidates, config)
    excluded = _excluded(model, candidates, config.exclude_modules or ())
    chosen: dict[int | str, Target] = {}
    left: dict[int | str, tuple[str, str]] = {}
    for candidate in candidates:
        key, name = candidate.key, candidate.names[-1]
        asked = match_any(candidate.names, named)
        if key in chosen or not (asked or (linear and candidate.linear)):
            continue
        reason = EXCLUDED if key in excluded else candidate.why_not()
        if reason is None:
            place = candidate.places[0]
            m, n = place.weight.shape[-2:]
            chosen[key] = Target(candidate.places, preserved_rank(place.name, (m, n), config))
        elif asked and reason not in (EXCLUDED, FROZEN):
            raise _cannot(name, reason, config)
        else:
            left[key] = name, reason
    if not chosen:
        raise _nothing_trains([*left.values()], config)
    return Targets([*chosen.values()], _left_out(model, candidates, chosen, left, heads))


def _candidates(model: nn.Module, heads: Mapping[nn.Module, str]) -> list[_Candidate]:
    """All matrices in the model's order; those of a shared module once for each of its names."""
    users: dict[int, list[Place]] = defaultdict(list)
    for path, module in model.named_modules():
        for parameter, value in module.named_parameters("", recurse=False, remove_duplicate=False):
            users[id(value)].append(Place(path, module, parameter, _is_conv1d(module)))
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ParametrizationList):
            continue
        computed = computed_weights(module)
        parts = tuple(f"{name}_" for name in computed)
        for parameter, value in module.named_parameters("", recurse=False, remove_duplicate=False):
            if _is_matrix(parameter, value) and not parameter.startswith(parts):
                own = [
                    u for u in users[id(value)] if (u.module, u.parameter) == (module, parameter)
                ]
                others = [use for use in users[id(value)] if use not in own]
                linear = module not in heads and _is_linear(module, parameter)
                found.append(_Candidate(names_of(path, parameter), (*own, *others), linear))
        for name, reason in computed.items():
            linear = module not in heads and _is_linear(module, name)
            prefix = f"{path}." if path else ""
            parts = (f"{prefix}{name}_", f"{prefix}parametrizations.{name}.")
            found.append(_Candidate(names_of(path, name), (), linear, reason, parts))
    return found


def _is_matrix(parameter: str, value: Tensor) -> bool:
    """Whether a module's parameter may be a target: its weight, or a stack of matrices."""
    if parameter == "weight":
        return value.ndim >= 2
    return value.ndim == 3 and min(value.shape[-2:]) > 1


def _is_conv1d(module: nn.Module) -> bool:
    """By name: the class is in transformers, which need not be imported for this."""
    return type(module).__name__ == "Conv1D"


def _is_linear(module: nn.Module, parameter: str) -> bool:
    """What `"all-linear"` takes: linear layers, and the matrices of a mixture of experts."""
    kind = type(module).__name__.removeprefix("Parametrized")
    if parameter == "weight":
        return isinstance(module, nn.Linear) or kind == "Conv1D"
    return kind.endswith("Experts")


def _check_named(
    model: nn.Module, candidates: list[_Candidate], named: Patterns, config: SculptConfig
) -> None:
    """Raise `ValueError` for an entry without a match, and for a module without a matrix."""
    modules = dict(model.named_modules(remove_duplicate=False))
    known = {name for candidate in candidates for name in candidate.names}
    for path in (path for path in modules if path not in known):
        if matches(path, named) and not matches(path, config.exclude_modules or ()):
            raise _cannot(path, why_no_matrix(modules[path]), config)
    for entry in without_match(named, (*modules, *known)):
        for full, value in model.named_parameters(remove_duplicate=False):
            if matches(full, entry if isinstance(named, str) else [entry]):
                module = model.get_submodule(full.rpartition(".")[0])
                raise _cannot(full, _why_no_candidate(full, value, module, candidates), config)
        raise ValueError(
            f"{no_match('target_modules', config.target_modules, entry, known)}; "
            f"the model's linear layers end in {_linear_suffixes(candidates)}"
        )


def _check_ranks(candidates: list[_Candidate], config: SculptConfig) -> None:
    known = {name for candidate in candidates for name in candidate.names}
    for pattern in config.rank_pattern:
        if not any(matches_end(name, pattern) for name in known):
            raise ValueError(no_match("rank_pattern", config.rank_pattern, pattern, known))


def _why_no_candidate(
    full: str, value: Tensor, module: nn.Module, candidates: list[_Candidate]
) -> str:
    path, _, parameter = full.rpartition(".")
    whole = _computed_from(full, candidates)
    if whole is not None:
        return whole.computed
    if _is_matrix(parameter, value):
        return f"a weight goes by the name of its module, {path!r}"
    reason = why_not_alone(module, parameter, value)
    return reason or f"its shape {tuple(value.shape)} is not that of a matrix"


def _computed_from(full: str, candidates: list[_Candidate]) -> _Candidate | None:
    """The matrix that is computed from this parameter, if any is."""
    return next((c for c in candidates if c.parts and full.startswith(c.parts)), None)


def _excluded(model: nn.Module, candidates: list[_Candidate], exclude: Patterns) -> set[int | str]:
    """Keys of what is excluded. Raises `ValueError` for an entry without a match."""
    modules = dict(model.named_modules(remove_duplicate=False))
    holds_others = {path for path, m in modules.items() if m._modules and not m._parameters}
    known = {
        *(modules.keys() - holds_others),
        *(name for candidate in candidates for name in candidate.names),
    }
    for entry in without_match(exclude, known):
        for path in modules:
            if matches(path, entry if isinstance(exclude, str) else [entry]):
                raise ValueError(
                    f"exclude_modules={exclude!r}: {path!r} has no weight of its own, and PEFT's "
                    "rule excludes the layers that are named, not what is inside of them: for that "
                    f"write a regular expression, exclude_modules={re.escape(path) + '[.].*'!r}"
                )
        raise ValueError(no_match("exclude_modules", exclude, entry, known))
    return {c.key for c in candidates if match_any(c.names, exclude)}


def _cannot(name: str, reason: str, config: SculptConfig) -> ValueError:
    return ValueError(
        f"target_modules={config.target_modules!r} matches {name!r}, which cannot be sculpted: "
        f"{reason}"
    )


def _nothing_trains(left: list[tuple[str, str]], config: SculptConfig) -> ValueError:
    """What to say where each matrix that matches was left out, by name with the reason."""
    targets = f"target_modules={config.target_modules!r}"
    if not left:
        return ValueError(f"{targets}: the model has no linear layer and no stack of experts")
    named = {reason: name for name, reason in reversed(left)}  # The first one of each reason.
    parts = []
    if EXCLUDED in named:
        parts.append(f"in exclude_modules={config.exclude_modules!r}")
    if FROZEN in named:
        parts.append(
            f"frozen ({named[FROZEN]!r} the first): requires_grad is False, and what is frozen is "
            "not trained; call parameter.requires_grad_(True) on what shall train"
        )
    parts += [
        f"of a kind that cannot be sculpted ({name!r}): {reason}"
        for reason, name in named.items()
        if reason not in (EXCLUDED, FROZEN)
    ]
    return ValueError(f"{targets}: every matching matrix is {', or '.join(parts)}")


def _left_out(
    model: nn.Module,
    candidates: list[_Candidate],
    chosen: Mapping[int | str, Target],
    left: Mapping[int | str, tuple[str, str]],
    heads: Mapping[nn.Module, str],
) -> dict[str, str]:
    """The reason for each parameter that is no target, and for each matrix that is computed."""
    computed = [candidate for candidate in candidates if candidate.parts]
    reasons: dict[str, str] = {}
    for full, value in model.named_parameters(remove_duplicate=False):
        if id(value) in chosen:
            continue
        path, _, parameter = full.rpartition(".")
        whole = _computed_from(full, computed)
        if whole is not None:
            reasons[full] = "not in target_modules"
            if whole.key in left:
                name, reasons[name] = left[whole.key]
                reasons[full] = f"part of {name!r}"
        elif id(value) in left:
            reasons[full] = left[id(value)][1]
        else:
            reasons[full] = _why_not_asked(model.get_submodule(path), parameter, value, heads)
    return reasons


def _why_not_asked(
    module: nn.Module, parameter: str, value: Tensor, heads: Mapping[nn.Module, str]
) -> str:
    if is_bias(parameter):
        return "bias: only matrices are sculpted"
    if module in heads:
        return heads[module]
    reason = None if _is_matrix(parameter, value) else why_not_alone(module, parameter, value)
    if reason is not None:
        return reason
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


def _linear_suffixes(candidates: list[_Candidate]) -> str:
    names = {c.names[-1].rpartition(".")[2] for c in candidates if c.linear}
    return ", ".join(sorted(names)) or "nothing"
