"""The bytes and FLOPs of training one matrix, by each method: pure arithmetic.

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

import math
from dataclasses import dataclass, fields, replace
from typing import Self

import torch

from sculpt.config import SculptConfig
from sculpt.task.originals import place_of_original
from sculpt.task.targets import LOW_PRECISION, Target
from sculpt_kernels import plan

WIDE = torch.float32
MOMENTS = 2
"""States that AdamW keeps for each trained element."""


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

    @classmethod
    def of(cls, target: Target, rows: int = 0, needs_dx: bool = True) -> Matrix:
        *stack, m, n = target.shape
        rank, count = target.trainable_rank, math.prod(stack)
        return cls(target.name, (m, n), rank, count, rows, needs_dx)

    @property
    def elements(self) -> int:
        return self.count * self.shape[0] * self.shape[1]

    @property
    def preserved(self) -> int:
        return min(self.shape) - self.trainable_rank


@dataclass(frozen=True)
class Storage:
    """How a matrix trains, and in which dtypes things are kept.

    Attributes:
        weight: of the weight, and of its gradient where it trains itself.
        basis: of sculpt's bases.
        state: of the optimizer's states; `None` for that of what trains, as `torch.optim` does.
        engine, form: of sculpt; full: whole coordinates of the longer side.
        original: where `W₀` is: `"device"`, or somewhere else.
        micro_batches: passes in one step.
    """

    weight: torch.dtype = WIDE
    basis: torch.dtype = WIDE
    state: torch.dtype | None = WIDE
    engine: str = "compact"
    form: str = "strict"
    full: bool = False
    original: str = "device"
    micro_batches: int = 1

    @classmethod
    def of(
        cls,
        target: Target,
        config: SculptConfig,
        state: torch.dtype | None = None,
        micro_batches: int = 1,
    ) -> Storage:
        weight = target.parameter.dtype
        basis = weight if config.basis_dtype == "weight" else torch.promote_types(weight, WIDE)
        full = config.coordinates == "full"
        place = place_of_original(config, target)
        return cls(weight, basis, state, config.chosen_engine, config.constraint, full, place,
                   micro_batches)  # fmt: skip

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.weight, WIDE)

    def of_states(self, elements: int, trained: torch.dtype) -> int:
        return MOMENTS * elements * (self.state or trained).itemsize


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
    def moving(self) -> int:
        """Bytes that change with every step, weights not counted."""
        return self.factors + self.gradients + self.optimizer

    @property
    def fixed(self) -> int:
        """Bytes beside the weights that stay during a task, wherever they are."""
        return self.bases + self.copies + self.host

    @property
    def held(self) -> int:
        """Bytes on the device between steps, gradients included."""
        return self.weights + self.moving + self.bases + self.copies

    @property
    def flops(self) -> int:
        return self.forward + self.backward + self.update


def _beside(matrix: Matrix, storage: Storage, elements: int) -> Cost:
    """What trains beside the weight, in float32 where weights are 16-bit."""
    size, dtype = matrix.elements * storage.weight.itemsize, storage.wide
    trained = elements * dtype.itemsize
    states = storage.of_states(elements, dtype)
    forward, dx = _dense_flops(matrix)
    return Cost(elements, size, factors=trained, gradients=trained, optimizer=states,
                forward=forward, backward=dx)  # fmt: skip


def _dense_flops(matrix: Matrix) -> tuple[int, int]:
    """Forward, and the gradient of the input."""
    product = 2 * matrix.rows * matrix.shape[0] * matrix.shape[1]
    return product, product if matrix.needs_dx else 0


def _original(matrix: Matrix, storage: Storage) -> Cost:
    """`W₀`."""
    size = matrix.elements * storage.weight.itemsize
    return Cost(copies=size) if storage.original == "device" else Cost(host=size)


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


def sculpt(matrix: Matrix, storage: Storage) -> Cost:
    """Any engine of sculpt."""
    found = _compact(matrix, storage) if storage.engine == "compact" else _dense(matrix, storage)
    return found + _original(matrix, storage)


def _compact(matrix: Matrix, storage: Storage) -> Cost:
    """Coordinates `C` `(t, t)`, or `(m, t)` or `(t, n)` for all of the longer side, and bases."""
    (m, n), t, h, T = matrix.shape, matrix.trainable_rank, matrix.preserved, matrix.rows
    k, longer = min(m, n), max(m, n)
    full = storage.full and m != n
    rows, columns = (m if full and m > n else t), (n if full and m < n else t)
    coordinates = matrix.count * rows * columns
    bases, update = (m + n) * t, 2 * m * n * t + 2 * k * t * t
    if full:
        bases = k * t + longer * h
        # Each pass projects its gradient, and each step the coordinates.
        update = 2 * m * n * t + (storage.micro_batches + 1) * 4 * longer * h * t
    return _beside(matrix, storage, coordinates) + Cost(
        bases=matrix.count * bases * storage.basis.itemsize,
        copies=coordinates * storage.wide.itemsize,  # those that are in the weight by now
        forward=0 if columns == n else 2 * T * n * t,
        backward=(0 if rows == m else 2 * T * m * t) + 2 * T * rows * columns,
        update=matrix.count * update,
    )


def _dense(matrix: Matrix, storage: Storage) -> Cost:
    """Engines that train the weight and project its change or its gradient."""
    (m, n), t, h = matrix.shape, matrix.trainable_rank, matrix.preserved
    best = plan((m, n), h, form=storage.form, dtype=storage.basis, device="cpu")
    low = m == n and best.complement == "both"
    chosen = plan((m, n), h, form=storage.form, dtype=storage.basis, device="cpu",
                  complement="both" if low else "none")  # fmt: skip
    dense = plain(matrix, storage)
    if storage.weight in LOW_PRECISION:
        # What trains is the change of 16-bit weights, in float32.
        change = _beside(matrix, storage, matrix.elements)
        dense = replace(change, forward=dense.forward, backward=dense.backward)
    times = 1 if storage.engine == "update" else storage.micro_batches
    return dense + Cost(
        bases=matrix.count * (t if low else h) * (m + n) * storage.basis.itemsize,
        update=matrix.count * chosen.flops * times,
    )


def lora(matrix: Matrix, storage: Storage, rank: int = 32) -> Cost:
    """LoRA as in PEFT: `A` `(r, n)`, `B` `(m, r)`."""
    m, n = matrix.shape
    pair = 2 * matrix.rows * rank * (m + n)
    # Without a gradient of the input, `A` passes none on.
    dropped = 0 if matrix.needs_dx else 2 * matrix.rows * rank * n
    return _beside(matrix, storage, matrix.count * rank * (m + n)) + Cost(
        forward=pair, backward=2 * pair - dropped
    )


def osf(matrix: Matrix, storage: Storage) -> Cost:
    """PEFT's OSF at the same trainable rank."""
    (m, n), t, h = matrix.shape, matrix.trainable_rank, matrix.preserved
    k, longer = min(m, n), max(m, n)
    pair = 4 * matrix.rows * t * (m + n)
    dropped = 0 if matrix.needs_dx else 4 * matrix.rows * t * n
    low = matrix.count * (t * (m + n) + t)
    high = 0 if m == n else matrix.count * h * longer
    on_long_side = 4 * longer * h * t if m != n else 4 * k * t * t
    return _beside(matrix, storage, low) + Cost(
        bases=(low + high) * storage.wide.itemsize,
        forward=pair,
        backward=2 * pair - dropped,
        update=storage.micro_batches * matrix.count * (4 * k * t * t + on_long_side),
    )


def cost_of(target: Target, config: SculptConfig) -> Cost:
    """What sculpt holds for a target between steps, with the states of `torch.optim.AdamW`."""
    return sculpt(Matrix.of(target), Storage.of(target, config))


def trained_elements(target: Target, config: SculptConfig) -> int:
    """How many numbers the optimizer moves for this target."""
    return cost_of(target, config).trainable
