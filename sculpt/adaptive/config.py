"""How ranks adapt, as the user chooses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

IMPORTANCE = ("auto", "cosine", "fisher", "curvature")
BUDGETS = ("trainable_elements", "memory_bytes", "protected_energy")


@dataclass(frozen=True)
class AdaptiveRanks:
    """Preserved ranks `h = floor(r k)` with `r = mrr + I (trr - mrr)`, `k = min(m, n)`.

    `I` is the importance of a layer, scaled to a mean of 1 over the layers: by the cosine this is
    the rule of "Sculpting Subspaces" (Nayak et al., arXiv 2504.07097). `h` is kept within
    `1 ... k - 1`, which a layer with `I > (1 - mrr) / (trr - mrr)` needs.

    Attributes:
        mrr: retained fraction of a layer of no importance, in [0, 1).
        trr: retained fraction of a layer of mean importance, in (0, 1), at least `mrr`.
        importance: what `I` is before it is scaled.
            `"auto"`: `"curvature"` where something is protected; otherwise `"fisher"` where the
            calibration data give a loss (batches with labels for a model that computes one, or
            functions that return it) and `fully_shard` has divided no matrix, otherwise `"cosine"`;
            the table says which.
            `"curvature"`: no rule but the budget, by default as many numbers as at a retained
            fraction of `trr` everywhere, or as much energy where whole weights train. A direction
            more trains where it adds least to the curvature `tr S_l tr A_l` of what is protected,
            in the `t` trailing directions of both sides, for each number that it trains, and no
            layer retains less than `mrr`. Before anything is protected all layers retain `trr`.
            `"cosine"`: mean cosine of a layer's input and output over all positions of the
            calibration data, below 0 counted as 0; vectors of unequal length are cut to the shorter
            one. `"fisher"`: `√(mn) ‖U_lᵀ G V_l‖ / t`, root mean square over the gradients `G` of
            the calibration batches, `U_l, V_l` the `t = k - floor(trr k)` trailing singular
            vectors: the second-order loss of a step of AdamW, to the square root.
        trainable_elements: budget, instead of the mean `trr`: numbers that train in all layers
            together, as an int, or as a share of the sculpted weights, a float in (0, 1).
        memory_bytes: budget: of bases, coordinates, their copy, gradients and two moments.
        protected_energy: budget: preserved share of `Σ ‖W‖²_F` over all layers, or of
            `Σ tr S tr A` by curvature, in (0, 1).

    With a budget all retained fractions `min(r, 1)` are shifted by the same amount, which is found
    so that the budget is met to 1 %, or to one direction of one layer where that is more.

    Raises:
        TypeError, ValueError: a value does not fit; the message names the field.
    """

    mrr: float = 0.1
    trr: float = 0.8
    importance: str = "auto"
    trainable_elements: int | float | None = None
    memory_bytes: int | None = None
    protected_energy: float | None = None

    def __post_init__(self) -> None:
        for name in ("mrr", "trr"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, float):
                raise TypeError(
                    f"ranks.{name} must be a float; got {value!r} ({type(value).__name__})"
                )
        if not 0.0 <= self.mrr <= self.trr < 1.0 or self.trr == 0.0:
            raise ValueError(
                f"ranks must have 0 <= mrr <= trr < 1 and trr > 0; got mrr={self.mrr}, "
                f"trr={self.trr}"
            )
        if self.importance not in IMPORTANCE:
            raise ValueError(
                f"ranks.importance must be one of {', '.join(map(repr, IMPORTANCE))}; "
                f"got {self.importance!r}"
            )
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"ranks.{given[0]} and ranks.{given[1]} exclude each other")
        self._check_budgets()

    @property
    def budget(self) -> tuple[str, float] | None:
        """Name and value of the budget that is set."""
        return next(((n, v) for n in BUDGETS if (v := getattr(self, n)) is not None), None)

    def _check_budgets(self) -> None:
        elements = self.trainable_elements
        if isinstance(elements, float):
            _check_share("trainable_elements", elements)
        elif elements is not None:
            _check_count("trainable_elements", elements)
        if self.memory_bytes is not None:
            _check_count("memory_bytes", self.memory_bytes)
        if self.protected_energy is not None:
            _check_share("protected_energy", self.protected_energy)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"ranks.{name} must be an int; got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"ranks.{name} must be at least 1; got {value}")


def _check_share(name: str, value: Any) -> None:
    if not isinstance(value, float):
        raise TypeError(
            f"ranks.{name} must be a float in (0, 1); got {value!r} ({type(value).__name__})"
        )
    if not 0.0 < value < 1.0:
        raise ValueError(f"ranks.{name} must be in (0, 1); got {value}")
