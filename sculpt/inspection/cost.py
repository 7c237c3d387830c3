"""The cost model: bytes and FLOPs of training one matrix, by each method. Pure arithmetic.

Notation: `W` is `m x n` (out x in), `k = min(m, n)`, `l = max(m, n)`, `t` trainable and `h = k - t`
preserved directions, `T` rows of input (tokens) in one step. A product of `a x b` with `b x c`
counts `2abc` FLOPs; what is not a matrix product counts nothing.

| method | forward | backward | once a step |
|---|---|---|---|
| plain | `2Tmn` | `2Tmn + 2Tmn` (`dx`, `dW`) | |
| compact, thin | `2Tmn + 2Tnt` | `2Tmn + 2Tmt + 2Tt²` | `2mnt + 2kt²` (`W += U ΔC Vᵀ`) |
| compact, full, `m > n` | `2Tmn + 2Tnt` | `2Tmn + 2Tmt` | `2mnt + 8lht` |
| compact, full, `m < n` | `2Tmn` | `2Tmn + 2Tmt + 2Tnt` | `2mnt + 8lht` |
| update, gradient | `2Tmn` | `2Tmn + 2Tmn` | one projection (`sculpt_kernels.plan`) |
| LoRA | `2Tmn + 2Tr(m+n)` | `2Tmn + 4Tr(m+n)` | |
| OSF | `2Tmn + 4Tt(m+n)` | `2Tmn + 8Tt(m+n)` | `4kt² + 4lht` (two gradients projected) |

OSF is that of PEFT 0.21: factors of rank `t` that train, a frozen copy of them, and the preserved
factor of the longer side; it runs through both copies as one product of rank `2t`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch

from sculpt_kernels import plan

WIDE = torch.float32


@dataclass(frozen=True)
class Matrix:
    """One weight `(m, n)`, or `count` of them in a stack.

    Attributes:
        trainable_rank: `t`.
        rows: `T`, rows of input in one step, over all micro-batches.
        needs_dx: whether the gradient goes on through the input; not in a first layer.
    """

    name: str
    shape: tuple[int, int]
    trainable_rank: int
    count: int = 1
    rows: int = 0
    needs_dx: bool = True

    @property
    def elements(self) -> int:
        return self.count * self.shape[0] * self.shape[1]

    @property
    def preserved(self) -> int:
        return min(self.shape) - self.trainable_rank


@dataclass(frozen=True)
class Storage:
    """In which dtypes things are kept.

    Attributes:
        weight: of the weights, and of gradients where weights themselves train.
        basis: of sculpt's bases.
        state: of the optimizer's states; `None` for that of what trains, as `torch.optim` does.
        states: how many of them an optimizer keeps for each trainable element: 2 for AdamW.
        full_coordinates: of the compact engine.
        original: where `W₀` is: `"device"`, or somewhere else.
        micro_batches: passes in one step.
    """

    weight: torch.dtype = WIDE
    basis: torch.dtype = WIDE
    state: torch.dtype | None = WIDE
    states: int = 2
    full_coordinates: bool = False
    original: str = "device"
    micro_batches: int = 1

    @property
    def low_precision(self) -> bool:
        return self.weight.itemsize < WIDE.itemsize

    def of_states(self, elements: int, trained: torch.dtype) -> int:
        return self.states * elements * (self.state or trained).itemsize

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.weight, WIDE)


@dataclass(frozen=True)
class Cost:
    """Elements, bytes and FLOPs; costs of several matrices add up.

    Attributes:
        trainable: elements that train.
        weights: bytes of the weights.
        bases: bytes of what is frozen beside them.
        factors: bytes of what trains beside them.
        copies: bytes of other values kept on the device: `W₀`, coordinates before a step.
        gradients, optimizer: bytes.
        host: bytes kept in host memory or on disk.
        forward, backward: FLOPs of all passes of one step; update: FLOPs once a step,
            and of projecting gradients.
    """

    trainable: int = 0
    weights: int = 0
    bases: int = 0
    factors: int = 0
    copies: int = 0
    gradients: int = 0
    optimizer: int = 0
    host: int = 0
    forward: int = 0
    backward: int = 0
    update: int = 0

    def __add__(self, other: Cost) -> Self:
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return type(self)(*(a + b for a, b in pairs))

    @property
    def held(self) -> int:
        """Bytes on the device between steps, gradients included."""
        return (
            self.weights + self.bases + self.factors + self.copies + self.gradients + self.optimizer
        )

    @property
    def flops(self) -> int:
        return self.forward + self.backward + self.update


def _trained(matrix: Matrix, storage: Storage, elements: int, dtype: torch.dtype) -> dict[str, int]:
    """What trains beside the weight: factors, their gradients and the optimizer's states."""
    return {
        "trainable": elements,
        "weights": matrix.elements * storage.weight.itemsize,
        "factors": elements * dtype.itemsize,
        "gradients": elements * dtype.itemsize,
        "optimizer": storage.of_states(elements, dtype),
    }


def _dense_flops(matrix: Matrix) -> tuple[int, int]:
    """Forward, and the gradient of the input."""
    product = 2 * matrix.rows * matrix.shape[0] * matrix.shape[1]
    return product, product if matrix.needs_dx else 0


def plain(matrix: Matrix, storage: Storage) -> Cost:
    """Full fine-tuning of the matrix."""
    forward, dx = _dense_flops(matrix)
    size = matrix.elements * storage.weight.itemsize
    return Cost(
        trainable=matrix.elements,
        weights=size,
        gradients=size,
        optimizer=storage.of_states(matrix.elements, storage.weight),
        forward=forward,
        backward=dx + 2 * matrix.rows * matrix.shape[0] * matrix.shape[1],
    )


def compact(matrix: Matrix, storage: Storage) -> Cost:
    """Coordinates `C` `(t, t)` in float32, bases of both sides."""
    (m, n), t, T = matrix.shape, matrix.trainable_rank, matrix.rows
    if storage.full_coordinates and m != n:
        return _compact_full(matrix, storage)
    coordinates = matrix.count * t * t
    forward, dx = _dense_flops(matrix)
    return Cost(
        **_trained(matrix, storage, coordinates, storage.wide),
        **_copies(matrix, storage, coordinates),
        bases=matrix.count * (m + n) * t * storage.basis.itemsize,
        forward=forward + 2 * T * n * t,
        backward=dx + 2 * T * m * t + 2 * T * t * t,
        update=matrix.count * (2 * m * n * t + 2 * min(m, n) * t * t),
    )


def _compact_full(matrix: Matrix, storage: Storage) -> Cost:
    """`C` `(l, t)`, kept away from the preserved directions of the longer side."""
    (m, n), t, h, T = matrix.shape, matrix.trainable_rank, matrix.preserved, matrix.rows
    long, short = max(m, n), min(m, n)
    coordinates = matrix.count * long * t
    forward, dx = _dense_flops(matrix)
    away = matrix.count * 4 * long * h * t
    project_input = 2 * T * n * t if m > n else 0
    project_gradient = 0 if m > n else 2 * T * m * t
    return Cost(
        **_trained(matrix, storage, coordinates, storage.wide),
        **_copies(matrix, storage, coordinates),
        bases=matrix.count * (short * t + long * h) * storage.basis.itemsize,
        forward=forward + project_input,
        backward=dx + project_gradient + 2 * T * long * t,
        # Each pass projects its gradient, and each step the coordinates; without values neither is
        # seen when a pass is traced.
        update=matrix.count * 2 * m * n * t + (storage.micro_batches + 1) * away,
    )


def _copies(matrix: Matrix, storage: Storage, coordinates: int) -> dict[str, int]:
    """`W₀`, and the coordinates that are in the weight by now."""
    original = matrix.elements * storage.weight.itemsize
    folded = coordinates * storage.wide.itemsize
    on_device = storage.original == "device"
    return {
        "copies": folded + (original if on_device else 0),
        "host": 0 if on_device else original,
    }


def dense_engine(matrix: Matrix, storage: Storage, *, update: bool, form: str) -> Cost:
    """Engines that train the weight and project its change (`update`) or its gradient."""
    (m, n), t, h = matrix.shape, matrix.trainable_rank, matrix.preserved
    best = plan((m, n), h, form=form, dtype=storage.basis, device="cpu")
    complement = m == n and best.complement == "both"
    chosen = plan(
        (m, n), h, form=form, dtype=storage.basis, device="cpu",
        complement="both" if complement else "none",
    )  # fmt: skip
    projections = matrix.count * chosen.flops
    original = matrix.elements * storage.weight.itemsize
    on_device = storage.original == "device"
    dense = plain(matrix, storage)
    if storage.low_precision:
        # What trains is the change of 16-bit weights, in float32.
        change = _trained(matrix, storage, matrix.elements, storage.wide)
        dense = Cost(**change, forward=dense.forward, backward=dense.backward)
    return dense + Cost(
        bases=matrix.count * (t if complement else h) * (m + n) * storage.basis.itemsize,
        copies=original if on_device else 0,
        host=0 if on_device else original,
        update=projections * (1 if update else storage.micro_batches),
    )


def lora(matrix: Matrix, storage: Storage, rank: int = 32) -> Cost:
    """LoRA as in PEFT: `A` `(r, n)`, `B` `(m, r)`, kept in float32 where weights are 16-bit."""
    m, n = matrix.shape
    forward, dx = _dense_flops(matrix)
    pair = 2 * matrix.rows * rank * (m + n)
    # Without a gradient of the input, `A` passes none on.
    dropped = 0 if matrix.needs_dx else 2 * matrix.rows * rank * n
    return Cost(
        **_trained(matrix, storage, matrix.count * rank * (m + n), storage.wide),
        forward=forward + pair,
        backward=dx + 2 * pair - dropped,
    )


def osf(matrix: Matrix, storage: Storage) -> Cost:
    """PEFT's OSF at the same trainable rank; its adapters are float32 where weights are 16-bit."""
    (m, n), t, h = matrix.shape, matrix.trainable_rank, matrix.preserved
    k, long = min(m, n), max(m, n)
    forward, dx = _dense_flops(matrix)
    pair = 4 * matrix.rows * t * (m + n)
    dropped = 0 if matrix.needs_dx else 4 * matrix.rows * t * n
    low = matrix.count * (t * (m + n) + t)
    high = 0 if m == n else matrix.count * h * long
    on_long_side = 4 * long * h * t if m != n else 4 * k * t * t
    return Cost(
        **_trained(matrix, storage, low, storage.wide),
        bases=(low + high) * storage.wide.itemsize,
        forward=forward + pair,
        backward=dx + 2 * pair - dropped,
        update=storage.micro_batches * matrix.count * (4 * k * t * t + on_long_side),
    )
