"""The task sequence: train one task after another, and score all tasks seen after each.

A run goes through the phases of `sculpt.runs.state`. What the next phase depends on is the state,
the model, the method's own tensors, the optimizer and the generators, and a checkpoint holds them
all: a run that was killed ends with the same weights as one that was not.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from sculpt.memory import optimizer_state_bytes, peak_memory_bytes, reset_peak_memory
from sculpt.models.encoding import Encoded
from sculpt.report.results import Results
from sculpt.runs.directory import RunDirectory, RunError, versions
from sculpt.runs.layer_files import file_of, write_ranks
from sculpt.runs.lm_eval import general_ability
from sculpt.runs.logged import RunLog
from sculpt.runs.method import Advance
from sculpt.runs.prepare import Prepared
from sculpt.runs.state import NAN, MethodResult, Progress, Report, RunState
from sculpt.runs.termination import Terminated, deferred
from sculpt.storage.checkpoint import CheckpointError, Checkpoints, Part, tensors_part
from sculpt.storage.files import flush
from sculpt.storage.nested import flatten, random_states, set_random_states, unflatten

MEMORY = "memory.safetensors"


class TrainingError(RunError):
    """Training cannot go on; the message says where and what to try."""


class Run:
    """A run under way. What changes is `state`, the model, the method, and the task's optimizer."""

    def __init__(self, prepared: Prepared, directory: RunDirectory, report: Report) -> None:
        self.config = prepared.config
        self.tasks = prepared.tasks
        self.learner = prepared.learner
        self.directory = directory
        kept = self.config.checkpoint.keep
        self.checkpoints = Checkpoints(directory.path / "checkpoints", kept)
        self.strategy = prepared.strategy
        self.state = RunState(MethodResult(self.config.method))
        self.optimizer: torch.optim.Optimizer | None = None
        self._report = report
        self._where: Progress | None = None
        torch.manual_seed(self.config.seed)
        reset_peak_memory()

    def finish(self) -> Results:
        """Go through all phases that are left.

        After SIGTERM a step is finished and saved; elsewhere the last checkpoint has all that
        takes long. Raises `Terminated` then, and `TrainingError`, `RunError` or `CheckpointError`.
        """
        with deferred() as self._termination:
            self.directory.write_status("running", self._where, self.config.method)
            self._go_on()
            return self._results()

    def _go_on(self) -> None:
        phases: dict[str, Callable[[], None]] = {
            "begin": self._begin,
            "train": self._train,
            "certify": self._certify,
            "evaluate": self._evaluate,
            "finish": self._finish,
        }
        try:
            self._log = RunLog(self.config, self.directory)
            try:
                while self.state.phase != "done":
                    self._termination.obey()
                    phases[self.state.phase]()
            finally:
                self._log.close()
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | Terminated)
            with suppress(OSError):  # the disk may be what failed
                self.directory.write_status(
                    "interrupted" if stopped else "failed", self._where, self.config.method
                )
            raise

    def _begin(self) -> None:
        state = self.state
        if state.task == 0:
            self._general("before")
        with self._clock("subspaces"):
            self.optimizer = self.strategy.begin_task(state.task, self._advance("subspaces"))
            for group in self.optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        state.result.losses.append([])
        chosen = self.strategy.chosen()
        state.result.subspaces.append([asdict(row) for row in chosen])
        write_ranks(self.directory.path, self._file(), chosen)
        state.phase, state.step = "train", 0
        self._log.begun(state, chosen)
        self._save()

    def _train(self) -> None:
        state, training = self.state, self.config.training
        assert self.optimizer is not None
        optimizer = self.optimizer
        steps = self.strategy.steps(state.task)
        losses = state.result.losses[-1]
        self.learner.model.train(training.dropout)
        batches = self.strategy.batches(state.task, skip=state.step)
        while state.step < steps:
            with self._clock("train"):
                start = time.perf_counter()
                factor = training.factor(state.step + 1, steps)
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
                loss, tokens = self._gradients(next(batches))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                state.durations.append(time.perf_counter() - start)
            state.step += 1
            state.result.tokens += tokens
            losses.append(loss)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss of {self.config.method} is {loss} in step {state.step} of "
                    f"{self.tasks[state.task].name!r}: try an lr below {training.lr:g}"
                )
            speed = tokens / state.durations[-1]
            self._tell("train", state.step, steps, loss=loss, tokens_per_second=speed)
            self._log.step(state, loss, training.lr * factor, speed)
            due = state.step % self.config.checkpoint.every_steps == 0
            if state.step < steps and (due or self._termination.came):
                self._save()
                self._termination.obey()
        self.learner.model.eval()
        result = state.result
        trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        result.trainable_elements = max(result.trainable_elements, trained)
        held = optimizer_state_bytes(optimizer)
        result.optimizer_state_bytes = max(result.optimizer_state_bytes, held)
        state.phase = "certify"
        self._save()

    def _gradients(self, batch: list[Encoded]) -> tuple[float, int]:
        """Gradients of the mean loss over all that the batch learns, and of the method's own loss;
        the former, and its tokens."""
        training = self.config.training
        size = math.ceil(len(batch) / training.accumulate)
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        learned = sum(row.learned for row in batch)
        total, tokens = 0.0, 0
        for part in parts:
            loss, read = self.learner.loss(part)
            if len(parts) > 1:
                loss = loss * (sum(row.learned for row in part) / learned)
            torch.autograd.backward(loss)
            total += loss.item()
            tokens += read
        self.strategy.add_gradients()
        if training.max_grad_norm is not None:
            assert self.optimizer is not None
            groups = self.optimizer.param_groups
            torch.nn.utils.clip_grad_norm_(
                [p for group in groups for p in group["params"]], training.max_grad_norm
            )
        return total, tokens

    def _certify(self) -> None:
        state = self.state
        # The moments of this task must not be alive beside those of the next.
        self.optimizer = None
        with self._clock("certify"):
            certificate = self.strategy.certify(self._advance("certify"))
            self.strategy.end_task(state.task)
        held = self.strategy.held_bytes()
        state.result.held_bytes = max(state.result.held_bytes, held)
        if certificate is not None:
            state.result.certificates.append(certificate)
        self._log.certified(state, certificate)
        if self.config.checkpoint.models == "each":
            with self._clock("save"):
                self._save_model(f"models/{self._file()}")
        state.phase = "evaluate"
        self._save()

    def _evaluate(self) -> None:
        state, result = self.state, self.state.result
        count, seen = len(self.tasks), state.task + 1
        generated, among = [NAN] * count, [NAN] * count
        more: dict[str, list[float]] = {}
        with self._clock("evaluate"):
            for index, task in enumerate(self.tasks[:seen]):
                score = self.learner.score(task)
                generated[index], among[index] = score.generated, score.among_labels
                for name, value in score.more.items():
                    more.setdefault(name, [NAN] * count)[index] = value
                self._tell("evaluate", index + 1, seen, scored=task.name, accuracy=score.generated)
        result.generated.append(generated)
        result.among_labels.append(among)
        for name in {*more, *result.more}:
            rows = result.more.setdefault(name, [[NAN] * count for _ in range(state.task)])
            rows.append(more.get(name, [NAN] * count))
        self._log.tested(state, [task.name for task in self.tasks])
        state.task += 1
        state.phase = "begin" if state.task < count else "finish"
        self._save()

    def _finish(self) -> None:
        self._general("after")
        if self.config.checkpoint.models != "none":
            with self._clock("save"):
                self._save_model("model")
        self._measure_all()
        self._results().write(self.directory.path)
        flush(self.directory.path / "results.json")
        self.state.phase = "done"
        self.directory.write_status("finished", None, self.config.method)
        self.checkpoints.remove_all()

    def _file(self) -> str:
        """Names files of the current task."""
        return file_of(self.state.task, self.tasks[self.state.task].name)

    def _general(self, when: str) -> None:
        evaluation = self.config.evaluation
        if evaluation.lm_eval:
            with self._clock("evaluate"):
                self.state.result.general_scores[when] = general_ability(
                    self.learner, evaluation.lm_eval, evaluation.lm_eval_limit
                )

    def _save_model(self, folder: str) -> None:
        self.directory.save_model(folder, self.learner.save, self.strategy.save_beside)

    def _measure_all(self) -> None:
        result = self.state.result
        if self.state.durations:
            result.step_seconds = statistics.median(self.state.durations)
        result.peak_memory_bytes = max(result.peak_memory_bytes, peak_memory_bytes())

    def _results(self) -> Results:
        config = self.config.model_dump(mode="json")
        tasks = [
            {
                "name": task.name,
                "labels": task.labels,
                "measure": task.measure,
                "train": len(task.train),
                "test": len(task.test),
            }
            for task in self.tasks
        ]
        return Results(config, versions(), tasks, {self.config.method: self.state.result})

    def _save(self) -> None:
        """Write a checkpoint of everything that the rest of the run depends on."""
        if self.checkpoints.keep == 0:
            return
        with self._clock("save"):
            state = self.state
            self._measure_all()
            parts = {
                "random.safetensors": tensors_part(random_states),
                "model.safetensors": tensors_part(
                    lambda: weights_of(self.strategy.plain_state()), self._weights_version()
                ),
            }
            memory = self.strategy.memory()
            if memory:
                parts[MEMORY] = tensors_part(lambda: memory, self._task_version())
            optimizer: Any = None
            if self.optimizer is not None:
                optimizer, tensors = flatten(self.optimizer.state_dict(), "optimizer")
                parts["optimizer.safetensors"] = tensors_part(lambda: tensors)
                parts["method"] = Part(self.strategy.save)
            self.checkpoints.write({"state": state.to_dict(), "optimizer": optimizer}, parts)
            self.directory.write_status("running", self._where, self.config.method)

    def _weights_version(self) -> str | None:
        """The weights are the same from the end of a task to the first step of the next one, and
        need not be written again where those in between follow from other parts."""
        state = self.state
        if self.optimizer is not None and state.step and not self.strategy.weights_follow():
            return None
        return self._task_version()

    def _task_version(self) -> str:
        """Names what changes only at the end of a task."""
        return f"after {self.state.task + (self.state.phase == 'evaluate')} tasks"

    def restore(self) -> None:
        """Take up the newest checkpoint; without any, the run begins anew."""
        loaded = self.checkpoints.read()
        if loaded is None:
            return
        self.state = RunState.from_dict(loaded.state["state"])
        state = self.state
        load_weights(self.learner.model, loaded.tensors("model.safetensors"))
        if (loaded.path / MEMORY).is_file():
            self.strategy.remember(loaded.tensors(MEMORY))
        if state.phase in ("train", "certify"):
            self.optimizer = self.strategy.resume_task(state.task, loaded.path / "method")
            tensors = loaded.tensors("optimizer.safetensors")
            self.optimizer.load_state_dict(unflatten(loaded.state["optimizer"], tensors))
        # Last: what came before may have drawn random numbers.
        set_random_states(loaded.tensors("random.safetensors"))

    def _advance(self, phase: str) -> Advance:
        return lambda done, total: self._tell(phase, done, total)

    def _tell(self, phase: str, done: int, total: int, **more: Any) -> None:
        task = self.tasks[self.state.task].name
        self._where = Progress(self.config.method, task, phase, done, total, **more)
        self._report(self._where)
        if phase != "train":
            self._termination.obey()

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        """Add the seconds of a `with` block to one phase."""
        start = time.perf_counter()
        yield
        seconds = self.state.result.seconds
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def weights_of(model_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers of a `state_dict`, one of each group that shares memory."""
    seen: set[tuple[int, torch.Size]] = set()
    found = {}
    for name, value in model_state.items():
        place = (value.data_ptr(), value.shape)
        if value.numel() == 0 or place not in seen:
            seen.add(place)
            found[name] = value
    return found


@torch.no_grad()
def load_weights(model: torch.nn.Module, saved: dict[str, Tensor]) -> None:
    """Copy what `weights_of` gave into `model`. Raises `CheckpointError` where it does not fit."""
    expected = weights_of(model.state_dict())
    if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in saved.items()}:
        odd = sorted(expected.keys() ^ saved.keys()) or ["a shape"]
        raise CheckpointError(f"the checkpoint is of another model: {odd[0]} does not fit")
    for name, value in expected.items():
        value.copy_(saved[name])
