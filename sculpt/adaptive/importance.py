"""How important each layer is: one number, from data in one pass.

What passes through the model is reduced where it appears, to a sum and a count for each layer:
nothing of a batch is alive after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sculpt.adaptive.batches import Run, in_step, loss_of, runs, says_loss
from sculpt.distributed.processes import Processes
from sculpt.distributed.sharding import reshard, sharded_modules
from sculpt.task.targets import Place, Target
from sculpt_kernels import compress, is_divided, split


@dataclass
class Tally:
    """A running mean on the device of what is measured; `unseen` says why there is nothing."""

    total: Tensor | None = None
    count: Tensor | None = None
    unseen: str = "never reached by the calibration data"

    def add(self, total: Tensor, count: Tensor) -> None:
        self.total = total if self.total is None else self.total + total
        self.count = count if self.count is None else self.count + count


@dataclass(frozen=True)
class Importance:
    """Of one layer, before it is scaled.

    value: `None` where it could not be measured. note: why not. by: the measure.
    """

    value: float | None
    note: str = ""
    by: str = ""


def importance_of(
    model: nn.Module,
    targets: list[Target],
    kind: str,
    preserved: list[int],
    calibration: Any,
    processes: Processes,
) -> dict[str, Importance]:
    """Importance by `"cosine"`, `"fisher"` or `"auto"` of each target, by name.

    See `AdaptiveRanks`; every `Importance` says by which.

    Args:
        preserved: rank of each target that divides the coordinates for `"fisher"`.
        calibration: see `sculpt.adaptive.batches.runs`; in several processes each has its own, and
            all get the mean over them.

    Raises:
        TypeError, ValueError: the data cannot be used, or values in the model are not finite.
    """
    tallies = {target.name: Tally() for target in targets}
    error: Exception | None = None
    divided = any(is_divided(target.parameter) for target in targets)
    batches = runs(calibration, processes.device)
    if divided:
        batches = in_step(batches, processes)
    if kind == "auto":
        kind, batches = ("cosine", batches) if divided else _by_first(batches, model, processes)
    try:
        measure = _cosines if kind == "cosine" else _fisher(preserved)
        with _left_as_it_was(model), measure(model, targets, tallies) as after:
            for run in batches:
                after(run.call(model))
    except (TypeError, ValueError) as problem:
        error = problem
    finally:
        reshard(sharded_modules(model))
    processes.fail_together(error)
    said = processes.tell(
        {
            name: [0.0, 0.0] if t.total is None else [float(t.total), float(t.count or 0)]
            for name, t in tallies.items()
        }
    )
    found = {}
    for target in targets:
        total, count = (sum(one[target.name][i] for one in said) for i in (0, 1))
        if not math.isfinite(total):
            raise ValueError(f"calibration gives values that are not finite at {target.name!r}")
        if count == 0:
            found[target.name] = Importance(None, tallies[target.name].unseen, kind)
        elif kind == "cosine":
            found[target.name] = Importance(max(0.0, total / count), by=kind)
        else:
            found[target.name] = Importance(math.sqrt(total / count), by=kind)
    return found


def _by_first(
    batches: Iterator[Run], model: nn.Module, processes: Processes
) -> tuple[str, Iterator[Run]]:
    """`"fisher"` where the first batch gives a loss, on every process; and all batches again."""
    first: list[Run] = []
    gives = False
    error: Exception | None = None
    try:
        with _left_as_it_was(model), torch.no_grad():
            first.append(next(batches))
            gives = says_loss(first[0], first[0].call(model))
    except (TypeError, ValueError) as problem:
        error = problem
    processes.fail_together(error)
    return "fisher" if all(processes.tell(gives)) else "cosine", chain(first, batches)


@contextmanager
def _cosines(
    model: nn.Module, targets: list[Target], tallies: dict[str, Tally]
) -> Iterator[Callable[[Any], None]]:
    """Hooks that add up the cosine of input and output at every position that is no padding."""
    mask: list[Tensor | None] = [None]

    def note_mask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("attention_mask")
        mask[0] = given if isinstance(given, Tensor) else None

    with ExitStack() as stack, torch.no_grad():
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            handle = model.register_forward_pre_hook(note_mask, with_kwargs=True)
            stack.callback(handle.remove)
        for target in targets:
            tally = tallies[target.name]
            places = [place for place in target.places if _shows_both_sides(place)]
            if not places:
                tally.unseen = "its input and output are not those of a linear layer"
            for place in places:
                hook = place.module.register_forward_hook(_cosine_hook(tally, mask))
                stack.callback(hook.remove)
        yield lambda output: None


def _shows_both_sides(place: Place) -> bool:
    return place.parameter == "weight" and not isinstance(
        place.module, nn.Embedding | nn.EmbeddingBag
    )


def _cosine_hook(tally: Tally, mask: list[Tensor | None]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x, y = args[0].detach(), output.detach()
        d = min(x.shape[-1], y.shape[-1])
        cosines = F.cosine_similarity(x[..., :d].float(), y[..., :d].float(), dim=-1)
        keep = mask[0]
        if keep is not None and keep.shape == cosines.shape:
            cosines = torch.where(keep.bool(), cosines, 0)
            tally.add(cosines.sum(dtype=torch.float64), keep.bool().sum())
        else:
            count = torch.tensor(cosines.numel(), device=cosines.device)
            tally.add(cosines.sum(dtype=torch.float64), count)

    return hook


def _fisher(preserved: list[int]) -> Callable[..., Any]:
    """Squares of the gradient in the trailing singular coordinates; each gradient is dropped."""

    @contextmanager
    def measure(
        model: nn.Module, targets: list[Target], tallies: dict[str, Tally]
    ) -> Iterator[Callable[[Any], None]]:
        with ExitStack() as stack:
            model.requires_grad_(False)
            for target, h in zip(targets, preserved, strict=True):
                parameter = target.parameter
                parameter.requires_grad_(True)
                parameter.grad = None
                low = split(target.oriented(parameter.detach()), rank=h)
                hook = _gradient_hook(target, low.U, low.V, tallies[target.name])
                handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                stack.callback(handle.remove)
            yield _backward

    return measure


def _gradient_hook(target: Target, U: Tensor, V: Tensor, tally: Tally) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        G = target.oriented(parameter.grad).to(U.dtype)
        parameter.grad = None
        squares = compress(G, U, V).double().square()
        m, n = target.shape[-2:]
        total = squares.sum() * (m * n / squares.shape[-1] ** 2)
        if len(target.shape) == 3:
            total = total / target.shape[0]
        tally.add(total, torch.ones((), device=total.device))

    return hook


def _backward(output: Any) -> None:
    loss = loss_of(output)
    if loss is None:
        raise ValueError(
            "calibration for importance='fisher' must give a loss: batches with labels for a model "
            "that computes one, or functions of the model that return it; importance='cosine' "
            "needs none"
        )
    if not bool(torch.isfinite(loss.detach())):
        raise ValueError(f"calibration gives a loss that is not finite, {float(loss.detach())}")
    if loss.requires_grad:  # No layer that is measured was reached otherwise.
        torch.autograd.backward(loss)


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; modes, gradients and `requires_grad` are put back."""
    modes = {module: module.training for module in model.modules()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag, grad in before:
            parameter.requires_grad_(flag)
            parameter.grad = grad


def squared_values(W: Tensor) -> Tensor:
    """Squared singular values `(..., k)`, descending, float64, from the smaller Gram matrix."""
    W = W.double()
    A = W if W.shape[-2] <= W.shape[-1] else W.mT
    squares: Tensor = torch.linalg.eigvalsh(A @ A.mT).flip(-1).clamp_min(0)
    return squares
