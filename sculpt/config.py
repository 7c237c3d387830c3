"""What the user chooses: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from sculpt.adaptive.config import AdaptiveRanks
from sculpt.installation import require_own_package
from sculpt.messages import did_you_mean

require_own_package()

DEFAULT_UNFREEZE_RANK_RATIO = 0.25


@dataclass(frozen=True, kw_only=True)
class SculptConfig:
    """How a model is sculpted.

    Attributes:
        unfreeze_rank_ratio: trainable fraction `t / k` of each matrix's `k = min(m, n)` singular
            directions, in (0, 1). The default, where no rank is chosen otherwise, is 0.25.
        effective_rank: instead: the *preserved* rank `h`, PEFT's meaning: an int counts directions,
            a float in (0, 1) is a fraction of `k`.
        ranks: instead: an `AdaptiveRanks`, or a mapping of its fields: ranks that adapt to each
            layer.
        target_modules: PEFT's rules: `"all-linear"` (every linear layer and every stack of expert
            matrices, but no output embedding or classification head), a regular expression that
            matches the full module name, or a list of names and suffixes, `"all-linear"` among
            them or not. Embeddings and the output embedding on request. Weights that are frozen
            (`requires_grad` is False) when the task begins are not trained.
        exclude_modules: PEFT's rules: what of the targets is none: a regular expression that
            matches the full module name, or a list of names and suffixes. It is then one of
            `others`.
        rank_pattern: maps regular expressions (matched against the end of the module name, PEFT's
            rule) to a preserved rank like `effective_rank`; the first match wins.
        constraint: `"strict"`: `U_hᵀ ΔW = 0` and `ΔW V_h = 0`; `"core"`: `U_hᵀ ΔW V_h = 0`.
        engine: how the constraint is kept. `"compact"` (strict only) trains coordinates,
            `ΔW = γ U_l C V_lᵀ`; `"update"` trains the weights and projects what each optimizer step
            did to them; `"gradient"` projects gradients, as the paper does, and leaks wherever the
            optimizer is not plain SGD. `"auto"` is compact for strict and update for core.
        coordinates: of the compact engine. `"thin"`: `C` is `t x t`, trailing singular vectors on
            both sides; `"full"`: the longer side of a matrix keeps its whole complement, `C` is
            `max(m, n) x t`.
        subspaces: where the bases come from. `"weights"`: singular vectors of the weights, as in
            the paper; `"curvature"`: eigenvectors of the second moments of what each layer reads,
            and of the gradients at its output, over the rows that `Sculptor.protect` and
            `end_task` were given; `"auto"`: curvature as soon as something is protected.
        factor_bytes: memory that these second moments may take; what does not fit is sketched, the
            longest sides first. `None`: half of what is free on the device.
        sketch_rank: columns of a sketch.
        others: parameters that are no target: `"freeze"`, or `"train"` those that require grad,
            outside of any guarantee.
        weight_update: how bfloat16 and float16 weights follow `C`: `"stochastic"` rounds each
            step's change at random, unbiased; `"recompute"` rounds `W₀ + γ U_l C V_lᵀ` once.
            float32 and float64 weights are always recomputed.
        originals: where the weights before the task are kept. `"auto"`: beside the weights where
            each step starts from them, otherwise in host memory; `"cpu"`: in host memory, pinned
            where there is a GPU; `"disk"`: in a temporary file.
        basis_dtype: of the bases. `"float32"`; `"weight"` keeps those of 16-bit weights in 16 bits:
            half the memory, and a span that is tilted by the rounding, about 2e-3.
        skip_nonfinite: leave out steps whose gradients are not finite, with a warning; nothing is
            changed by them, the optimizer's state included.
        subspace_cache: directory where subspaces are kept, by hash of the weight, so that a model
            is decomposed once; `None` keeps none.
        seed: seed of the stochastic rounding.

    Raises:
        TypeError, ValueError: a value does not fit; the message names the field.
    """

    unfreeze_rank_ratio: float | None = None
    effective_rank: int | float | None = None
    ranks: AdaptiveRanks | None = None
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int | float] = field(default_factory=dict)
    constraint: str = "strict"
    engine: str = "auto"
    coordinates: str = "thin"
    subspaces: str = "auto"
    factor_bytes: int | None = None
    sketch_rank: int = 512
    others: str = "freeze"
    weight_update: str = "stochastic"
    originals: str = "auto"
    basis_dtype: str = "float32"
    skip_nonfinite: bool = True
    subspace_cache: str | os.PathLike[str] | None = None
    seed: int = 0

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        _check_names("SculptConfig", kwargs, cls)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        choices = ("unfreeze_rank_ratio", "effective_rank", "ranks")
        given = [name for name in choices if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{given[0]} and {given[1]} exclude each other; got "
                + ", ".join(f"{name}={getattr(self, name)!r}" for name in given)
                + " (unfreeze_rank_ratio is the trainable fraction, effective_rank the preserved "
                "rank)"
            )
        if not given:
            object.__setattr__(self, "unfreeze_rank_ratio", DEFAULT_UNFREEZE_RANK_RATIO)
        if self.ranks is not None:
            object.__setattr__(self, "ranks", _adaptive(self.ranks))
        if self.unfreeze_rank_ratio is not None:
            _check_ratio(self.unfreeze_rank_ratio)
        if self.effective_rank is not None:
            check_preserved("effective_rank", self.effective_rank)
        if not isinstance(self.rank_pattern, Mapping):
            raise TypeError(
                "rank_pattern must map regular expressions to preserved ranks; "
                f"got {self.rank_pattern!r}"
            )
        for pattern, rank in self.rank_pattern.items():
            _check_regex("rank_pattern", pattern)
            check_preserved(f"rank_pattern[{pattern!r}]", rank)
        _check_patterns("target_modules", self.target_modules, "'all-linear', ")
        if self.exclude_modules is not None:
            _check_patterns("exclude_modules", self.exclude_modules, "None, ")
        _check_choice("constraint", self.constraint, ("strict", "core"))
        _check_choice("engine", self.engine, ("auto", "compact", "update", "gradient"))
        _check_choice("coordinates", self.coordinates, ("thin", "full"))
        _check_choice("subspaces", self.subspaces, ("auto", "weights", "curvature"))
        _check_count("sketch_rank", self.sketch_rank)
        if self.factor_bytes is not None:
            _check_count("factor_bytes", self.factor_bytes)
        _check_choice("others", self.others, ("freeze", "train"))
        _check_choice("weight_update", self.weight_update, ("stochastic", "recompute"))
        _check_choice("originals", self.originals, ("auto", "cpu", "disk"))
        _check_choice("basis_dtype", self.basis_dtype, ("float32", "weight"))
        if not isinstance(self.skip_nonfinite, bool):
            raise TypeError(f"skip_nonfinite must be True or False; got {self.skip_nonfinite!r}")
        self._check_engine()
        if not isinstance(self.subspace_cache, str | os.PathLike | None):
            raise TypeError(f"subspace_cache must be a path or None; got {self.subspace_cache!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int; got {self.seed!r}")

    @property
    def chosen_engine(self) -> str:
        """`engine`, with `"auto"` resolved."""
        if self.engine != "auto":
            return self.engine
        return "compact" if self.constraint == "strict" else "update"

    def _check_engine(self) -> None:
        if self.chosen_engine == "compact":
            if self.constraint == "core":
                raise ValueError(
                    "engine='compact' keeps constraint='strict' only, its coordinates have no "
                    "others; for constraint='core' use engine='update'"
                )
        elif self.coordinates != "thin":
            raise ValueError(
                f"coordinates={self.coordinates!r} is for engine='compact'; "
                f"engine={self.chosen_engine!r} moves in the whole allowed set already"
            )


def config_to_json(config: SculptConfig) -> dict[str, Any]:
    """Its fields as JSON holds them."""
    values = asdict(config)
    cache = values["subspace_cache"]
    values["subspace_cache"] = None if cache is None else os.fspath(cache)
    for name in ("target_modules", "exclude_modules"):
        if not isinstance(values[name], str | None):
            values[name] = list(values[name])
    return values


def _adaptive(ranks: Any) -> AdaptiveRanks:
    if isinstance(ranks, AdaptiveRanks):
        return ranks
    if not isinstance(ranks, Mapping):
        raise TypeError(f"ranks must be an AdaptiveRanks or a mapping of its fields; got {ranks!r}")
    _check_names("ranks", ranks, AdaptiveRanks)
    return AdaptiveRanks(**ranks)


def _check_names(owner: str, given: Iterable[str], kind: type[Any]) -> None:
    known = [f.name for f in fields(kind)]
    for name in given:
        if name not in known:
            raise TypeError(
                f"{owner} has no field {name!r}{did_you_mean(name, known) or '.'} "
                f"Known fields: {', '.join(known)}"
            )


def _check_ratio(ratio: Any) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, float):
        raise TypeError(
            "unfreeze_rank_ratio must be a float strictly between 0.0 and 1.0, the trainable "
            f"fraction; got {ratio!r} ({type(ratio).__name__})"
        )
    if ratio == 0.0:
        raise ValueError("unfreeze_rank_ratio=0.0 trains nothing; expected a value above 0.0")
    if ratio == 1.0:
        raise ValueError(
            "unfreeze_rank_ratio=1.0 preserves nothing; expected a value below 1.0 "
            "(for plain full fine-tuning use the optimizer without sculpt)"
        )
    if not 0.0 < ratio < 1.0:
        raise ValueError(f"unfreeze_rank_ratio must be strictly between 0.0 and 1.0; got {ratio}")


def check_preserved(name: str, rank: Any) -> None:
    """A preserved rank: an int of at least 1, or a float in (0, 1)."""
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise TypeError(
            f"{name} must be an int (preserved directions) or a float in (0, 1) (preserved "
            f"fraction); got {rank!r} ({type(rank).__name__})"
        )
    if rank == 0:
        raise ValueError(f"{name}={rank!r} preserves nothing; expected at least 1 direction")
    if isinstance(rank, float) and rank == 1.0:
        raise ValueError(
            f"{name}=1.0 preserves everything and trains nothing; expected a fraction below 1.0 "
            "(the int 1 preserves one direction)"
        )
    if rank < 0 or (isinstance(rank, float) and not 0.0 < rank < 1.0):
        raise ValueError(f"{name} must be an int >= 1 or a float in (0, 1); got {rank!r}")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")


def _check_patterns(name: str, patterns: Any, more: str) -> None:
    if isinstance(patterns, str):
        if patterns:
            _check_regex(name, patterns)
            return
    elif (
        isinstance(patterns, Sequence)
        and patterns
        and all(isinstance(entry, str) and entry for entry in patterns)
    ):
        return
    raise TypeError(
        f"{name} must be {more}a regular expression or a non-empty list of module names and "
        f"suffixes; got {patterns!r}"
    )


def _check_regex(name: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{name} must have regular expressions; got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from error


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        hint = did_you_mean(value, allowed) if isinstance(value, str) else ""
        raise ValueError(f"{name} must be one of {options}; got {value!r}{hint}")
