"""What an inspection found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sculpt.inspection.cost import Cost, Matrix
from sculpt.inspection.spectra import Spectrum


@dataclass(frozen=True)
class Setting:
    """What is trained with, for all methods alike.

    Attributes:
        tokens: in one optimizer step; sequence: tokens of one sequence.
        micro_batches: passes that a step accumulates.
        checkpointing: whether activations are recomputed in the backward.
        dtype: of the weights; states, state_dtype: what the optimizer keeps per trained element.
    """

    tokens: int
    sequence: int
    micro_batches: int
    checkpointing: bool
    dtype: str
    states: int
    state_dtype: str
    lora_rank: int


@dataclass(frozen=True)
class Method:
    """One way to train the model.

    Attributes:
        cost: of all matrices, and the bytes of all other weights.
        activations: bytes that a forward pass leaves for the backward; None if it cannot be traced.
        peak: bytes on the device at the worst moment of a step: what is held all the time, and what
            is alive in the pass.
        flops: of one step, attention, head and all others included.
    """

    label: str
    cost: Cost
    activations: int | None
    peak: int | None
    flops: int | None


@dataclass(frozen=True)
class Row:
    """One matrix: what it is, and its cost by each method."""

    matrix: Matrix
    costs: dict[str, Cost]
    spectrum: Spectrum | None


@dataclass(frozen=True)
class Inspection:
    """Cost of training a model by several methods; `str()` is a table.

    Attributes:
        model, kind: name and class; parameters: number of elements.
        trained: how it is sculpted, in words.
        methods: by name: `"plain"`, `"sculpt"`, `"lora"`, `"osf"`.
        rows: one for each matrix that is sculpted.
        left_out: parameters that are not, with the reason.
        notes: what could not be found out, and why.
    """

    model: str
    kind: str
    parameters: int
    trained: str
    setting: Setting
    methods: dict[str, Method]
    rows: list[Row]
    left_out: dict[str, str]
    notes: list[str]

    def __str__(self) -> str:
        from sculpt.inspection.view import as_text

        return as_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON would have it."""
        found = asdict(self)
        for name, method in self.methods.items():
            found["methods"][name]["cost"] |= {"held": method.cost.held}
            found["methods"][name]["matrix_flops"] = method.cost.flops
        return found
