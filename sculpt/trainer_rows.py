"""Rows of a Trainer's data that its task compares and protects; its training notices nothing of it.

The loader is not iterated, the collator is a copy, and the generators of Python, NumPy and torch
are afterwards where they were.
"""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from sculpt.adaptive.batches import loss_of, runs
from sculpt.config import SculptConfig
from sculpt.curvature.collect import choose_kinds
from sculpt.curvature.padding import IGNORED
from sculpt.distributed.processes import Processes
from sculpt.distributed.sharding import device_of, reshard, sharded_modules
from sculpt.messages import SculptWarning
from sculpt.sculptor import Sculptor
from sculpt.storage.nested import random_states, set_random_states
from sculpt.task.targets import find_targets

SAVING = ("auto_find_batch_size", "activation_checkpointing", "gradient_checkpointing")
"""Arguments by which a Trainer fits into memory what would not fit as a whole batch."""


class TaskRows:
    """Rows of one task, or none where nothing is protected, or where the model gives no loss.

    Args:
        config: with `subspaces`: "weights" needs no rows.
        given: batches in place of those that are drawn.
        count: how many rows are drawn, by all processes together.
    """

    def __init__(self, config: SculptConfig, given: Any, count: int) -> None:
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"calibration_rows must be an int; got {count!r}")
        if count < 1:
            raise ValueError(f"calibration_rows={count}, expected at least 1")
        self._config = config
        self._count = count
        self._drawn = given is None
        # They are read at both ends of the task.
        self._rows = list(given) if isinstance(given, Iterator) else given
        self._protects = config.subspaces != "weights"

    def draw(self, callback: TrainerCallback, processes: Processes) -> None:
        """Draw them, while the constructor of the Trainer tells its callbacks of its end."""
        if not self._protects or not self._drawn:
            return
        why = None
        try:
            self._rows = draw(callback, self._count, processes)
        except Exception as error:  # of data and collators that nothing is known of
            why = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        self._refuse(why, processes)

    def check(self, sculptor: Sculptor, args: Any) -> None:
        """Find out before training whether they can be protected after it."""
        if not self._protects:
            return
        model, config = sculptor.model, self._config
        targets = find_targets(model, config).chosen
        processes = Processes(None, device_of(targets[0].parameter))
        try:
            choose_kinds(targets, config, sculptor.memory, processes.device)
            with autocast(model, args):
                why = why_no_loss(model, self.batches(model), processes)
        except ValueError as error:
            why = str(error)
        self._refuse(why, processes)

    def _refuse(self, why: str | None, processes: Processes) -> None:
        """Go on without rows where one process has none, and say so."""
        reasons = [reason for reason in processes.tell(why) if reason is not None]
        if not reasons:
            return
        self._protects = False
        message = (
            f"nothing of this task will be protected from later ones: {reasons[0]}. Pass "
            "calibration=[...], batches with labels or functions of the model that return the "
            "summed loss of their rows"
        )
        if self._config.subspaces == "curvature":
            raise ValueError(message)
        warnings.warn(f"{message}, or subspaces='weights'", SculptWarning, stacklevel=2)

    def batches(self, model: nn.Module) -> Any:
        """Those that were given, or those that were drawn, where the model computes."""
        if not self._drawn:
            return self._rows
        if not self._protects:
            return None
        device = device_of(next(model.parameters()))
        return [_moved(batch, device) for batch in self._rows]

    def protect(self, sculptor: Sculptor, name: str, args: Any) -> None:
        """Let them join what is protected. What was trained is not lost where they cannot."""
        if not self._protects:
            return
        try:
            with autocast(sculptor.model, args):
                sculptor.protect(self.batches(sculptor.model), name)
        except (TypeError, ValueError, RuntimeError) as error:
            warnings.warn(
                f"nothing of this task is protected from later ones: {error}",
                SculptWarning,
                stacklevel=2,
            )


def draw(callback: TrainerCallback, count: int, processes: Processes) -> list[Any]:
    """Batches of `count` rows of the training data, those that the Trainer's seed draws.

    To be called while the constructor of the Trainer tells its callbacks of its end.

    Args:
        count: rows of all processes together; fewer where the data have fewer. Each process draws
            equally many of its own. Rows whose labels are all masked are left out.

    Raises:
        ValueError: there are none, or reading them would take them from training.
    """
    trainer = _trainer_of(callback)
    if trainer is None or trainer.train_dataset is None:
        raise ValueError("the Trainer was made without train_dataset")
    args = trainer.args
    # Activations are those of a whole batch here, even where training recomputes them.
    alone = any(getattr(args, name, False) for name in SAVING)
    size = 1 if alone else args.per_device_train_batch_size
    with _seeded(args.seed):
        loader = trainer.get_train_dataloader()
        # accelerate may have divided a stream.
        stream = isinstance(loader.dataset, IterableDataset)
        data = trainer.train_dataset if stream else loader.dataset
        collate = _copied(
            loader.collate_fn, (trainer, trainer.model, trainer.processing_class, args)
        )
        known = count if stream else min(count, len(data))
        own = max(1, known // processes.size)
        rows = _share(data, count, args.seed, processes)
        chosen = list(islice((row for row in rows if _is_learned(collate([row]))), own))
        if not chosen:
            raise ValueError("all labels of its train_dataset are masked")
        return [collate(chosen[start : start + size]) for start in range(0, len(chosen), size)]


def why_no_loss(model: nn.Module, batches: Iterable[Any], processes: Processes) -> str | None:
    """Why these batches cannot be protected, by the first of them; None where they can."""
    run = next(runs(batches, processes.device))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            loss = loss_of(run.call(model))
    except Exception as error:  # of a model or a batch that nothing is known of
        return f"the model does not take the batches: {type(error).__name__}: {error}"
    finally:
        for module, mode in modes.items():
            module.training = mode
        reshard(sharded_modules(model))
    if loss is None:
        return "the model gives no loss for the batches, which need labels that it takes"
    return None if bool(torch.isfinite(loss)) else f"the loss of a batch is {float(loss)}"


@contextmanager
def autocast(model: nn.Module, args: Any) -> Iterator[None]:
    """The precision in which the Trainer passes batches through the model."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if dtype is None:
        yield
        return
    mode: Any = torch.autocast(device_of(next(model.parameters())).type, dtype)

    def enter(*_: Any) -> None:
        mode.__enter__()

    def leave(*_: Any) -> None:
        mode.__exit__(None, None, None)

    before = model.register_forward_pre_hook(enter)
    after = model.register_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _moved(batch: Any, device: torch.device) -> Any:
    if not isinstance(batch, Mapping):
        return batch
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}


def _trainer_of(callback: TrainerCallback) -> Trainer | None:
    """The Trainer that calls this callback, which is told everything but that."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    return None


def _share(data: Any, count: int, seed: int, processes: Processes) -> Iterator[Any]:
    """Rows for this process, of a stream the first ones; some more than are wanted."""
    rank, size = processes.rank, processes.size
    if isinstance(data, IterableDataset):
        stream = iter(data)
        if stream is iter(data):
            raise ValueError("its train_dataset can be read but once, and it is training's to read")
        yield from islice(stream, rank, 4 * count * size, size)
        return
    order = random.Random(seed).sample(range(len(data)), min(len(data), 4 * count))
    # Equally many for each process, where there are fewer rows than processes, too.
    padded = islice(cycle(order), -(-len(order) // size) * size)
    yield from (data[index] for index in islice(padded, rank, None, size))


def _is_learned(batch: Any) -> bool:
    """Whether a batch has labels that are not masked, or none at all."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        return True
    # The first is not predicted where labels are those of the next token.
    learned = labels[..., 1:] if labels.ndim > 1 and labels.shape[-1] > 1 else labels
    return bool((learned != IGNORED).any())


def _copied(collate: Callable[..., Any], keep: Iterable[Any]) -> Callable[..., Any]:
    """A collator whose state, such as a generator of its own, is not that of training.

    keep: what it may refer to and is not copied.
    """
    try:
        return copy.deepcopy(collate, {id(kept): kept for kept in keep})
    except (TypeError, RuntimeError):  # what cannot be copied
        return collate


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    states = random_states()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global one, which collators use
    try:
        yield
    finally:
        set_random_states(states)
