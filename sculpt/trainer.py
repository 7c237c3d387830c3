"""The life cycle of a task inside `transformers.Trainer` and TRL's trainers."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer
from transformers import TrainerCallback
from transformers.utils import logging

from sculpt.certificate.leak import Certificate
from sculpt.config import SculptConfig, config_to_json
from sculpt.curvature.memory import Memory
from sculpt.distributed.processes import Processes
from sculpt.distributed.sharding import device_of, local
from sculpt.logs import Loggers, certificate_metrics, task_metrics
from sculpt.sculptor import Sculptor
from sculpt.storage import optimizer as optimizer_state
from sculpt.storage.files import write_json
from sculpt.task.compact import CoordinateMatrix
from sculpt.task.guards import innermost
from sculpt.task.supported import refuse_model
from sculpt.task.table import TaskRow, TaskTable
from sculpt.task.targets import find_targets
from sculpt.trainer_rows import TaskRows, autocast
from sculpt_kernels import is_divided

FOLDER = "sculptor"
CERTIFICATE = "certificate.json"
logger = logging.get_logger("sculpt.trainer")


class SculptCallback(TrainerCallback):  # type: ignore[misc]
    """One task of continual full fine-tuning, trained by a `Trainer`.

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[SculptCallback(config)])
        trainer.train()
        trainer.save_model("after")          # a plain Hugging Face model

    The task begins when the Trainer is made, so that its optimizer gets the coordinates, and ends
    with `train()`. `TrainingArguments.learning_rate` is that of dense weights. Checkpoints are
    plain models with what a restart needs beside them in `sculptor/`:
    `trainer.train(resume_from_checkpoint=True)` goes on where it was. The next task takes a new
    Trainer and a new callback on the same model.

    Unless `config.subspaces` is "weights", rows of the training data, with the Trainer's collator,
    join at the end what later tasks must not forget: `output_dir/sculpt_memory.safetensors`, which
    is the `memory` of the next callback. With a memory the task begins by comparing its rows with
    it. What is trained on does not depend on these rows: they are drawn beside the training.

    The certificate is in `output_dir/certificate.json`, and what it says goes to the services that
    `TrainingArguments.report_to` names.

    Args:
        config: what to sculpt and how much of it.
        name: of the task, for tables and certificates.
        independent: see `Sculptor.verify`.
        calibration: batches of this task, as for `Sculptor.protect`, in place of rows that are
            drawn: where the model itself gives no loss for those, for instance.
        calibration_rows: how many rows are drawn, by all processes together.
        memory: what earlier tasks use: `sculptor.memory` of an earlier callback or of a `Sculptor`,
            with which this one goes on, or a path for `Sculptor.load_memory`.

    Attributes:
        sculptor: None before the Trainer is made.
        table: what `begin_task` chose.
        certificate: None before the end of training.
    """

    def __init__(
        self,
        config: SculptConfig,
        *,
        name: str | None = None,
        independent: bool = False,
        calibration: Any = None,
        calibration_rows: int = 64,
        memory: Memory | str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(config, SculptConfig):
            raise TypeError(f"config must be a SculptConfig; got {type(config).__name__}")
        if not isinstance(memory, Memory | str | os.PathLike | None):
            raise TypeError(
                f"memory must be that of a Sculptor or a path; got {type(memory).__name__}"
            )
        if memory is not None and config.subspaces == "weights":
            raise ValueError(
                "memory is what earlier tasks use, which subspaces='weights' does not ask for; use "
                "subspaces='auto'"
            )
        if independent and memory is not None:
            raise ValueError(
                "independent=True decomposes the weights before the task, and with a memory its "
                "subspaces are from curvature; use independent=False"
            )
        self.config = config
        self.name = name
        self.independent = independent
        self.memory = memory
        self.sculptor: Sculptor | None = None
        self.table: TaskTable | None = None
        self.certificate: Certificate | None = None
        self._loggers: Loggers | None = None
        self._saved: Path | None = None
        self._waiting = False
        self._divided = False
        self._rows = TaskRows(config, calibration, calibration_rows)

    def on_init_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Begin the task: the optimizer does not exist yet."""
        _refuse_what_is_not_supported(args, more["model"])
        if self.sculptor is not None or self._waiting:
            raise RuntimeError(
                "this SculptCallback belongs to another Trainer already: make a new one for each"
            )
        refuse_model(more["model"])
        self._rows.draw(self, _processes(more["model"]))
        # FSDP2 divides the model when training begins, and a task begins on the divided model.
        self._waiting = _fsdp_version(args) is not None
        if not self._waiting:
            self._begin(more["model"], args)

    def _begin(self, model: nn.Module, args: Any) -> None:
        sculptor = Sculptor(model, self.config)
        if isinstance(self.memory, Memory):
            sculptor.memory = self.memory
        elif self.memory is not None:
            sculptor.load_memory(self.memory)
        if self.config.subspaces == "curvature" and not sculptor.memory:
            raise ValueError(
                "subspaces='curvature' needs a memory=...; the first task of a model begins with "
                "subspaces='auto', which protects its rows at its end"
            )
        self._rows.check(sculptor, args)
        with autocast(model, args):
            self.table = sculptor.begin_task(self._rows.batches(model), self.name)
        self.sculptor = sculptor
        logger.info(str(self.table))

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        optimizer = innermost(more["optimizer"])
        if self.sculptor is not None and self.sculptor.is_attached(optimizer):
            return  # auto_find_batch_size goes on with the same optimizer, from where it is.
        if self._waiting:
            self._begin_divided(args, state, more["model"], optimizer, more["lr_scheduler"])
        if self.sculptor is None:
            raise RuntimeError(
                "SculptCallback was added to a finished Trainer; pass it to the constructor, "
                "Trainer(..., callbacks=[SculptCallback(config)])"
            )
        if self.certificate is not None:
            raise RuntimeError(
                "the task of this SculptCallback has ended: for the next one make a new Trainer, "
                "with a new SculptCallback, on the same model"
            )
        if more["model"] is not self.sculptor.model:
            raise RuntimeError(
                "the Trainer made a new model after it was constructed (model_init): pass a model, "
                "not model_init"
            )
        _processes(more["model"]).require_equal({"training steps": state.max_steps})
        if state.global_step > 0 and not self._divided:
            self._resume(_saved_state(args, state.global_step), optimizer)
        self.sculptor.attach(optimizer)
        self._loggers = Loggers(
            args.report_to if state.is_world_process_zero else [],
            Path(args.output_dir),
            arguments=args,
        )
        assert self.table is not None
        begun = {**task_metrics(self.table.rows), "sculpt/subspace_seconds": self.table.seconds}
        self._loggers.log(begun, state.global_step)

    def _begin_divided(
        self, args: Any, state: Any, model: nn.Module, optimizer: Optimizer, scheduler: Any
    ) -> None:
        """Begin on the model that accelerate has divided; its optimizer holds dense weights."""
        if not any(is_divided(parameter) for parameter in model.parameters()):
            raise RuntimeError(
                "fsdp was asked for, but accelerate has not divided the model: it does so on "
                "accelerators only"
            )
        self._waiting, self._divided = False, True
        weights = dict(model.named_parameters())
        path = _saved_state(args, state.global_step)
        if state.global_step > 0:
            self._rows.check(Sculptor(model, self.config), args)
            self._load(model, path)
        else:
            self._begin(model, args)
        assert self.sculptor is not None
        trained = {
            weights.get(f"{name}.weight", weights.get(name)): parameter
            for name, parameter in self.sculptor.named_parameters()
        }
        for group in optimizer.param_groups:
            group["params"] = [trained[p] for p in group["params"] if p in trained]
        if state.global_step > 0:
            optimizer_state.load(path.parent, path, model, optimizer, scheduler, _processes(model))

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Put beside the checkpoint what a restart needs; what does not change is linked."""
        assert self.sculptor is not None
        if not args.save_only_model:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER
            self.sculptor.save(path, previous=self._saved)
            self._saved = path
            if self._divided:
                optimizer_state.put_aside(path.parent, path, _processes(self.sculptor.model))

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        # The last words of a Trainer, while the services still listen.
        if "train_runtime" in (more.get("logs") or {}) and self._loggers is not None:
            self._certify()
            assert self.certificate is not None
            values = certificate_metrics(self.certificate)
            self._loggers.log(values, state.global_step)
            state.log_history.append({**values, "step": state.global_step})
            self._loggers.close()
            self._loggers = None

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Prove, and leave a plain model behind."""
        assert self.sculptor is not None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # The Trainer has put back the weights; their coordinates may be beside them.
            best = Path(state.best_model_checkpoint) / FOLDER
            if best.is_dir():
                self._resume(best, None)
            self._certify()
        assert self.certificate is not None
        if not self.certificate.ok:
            logger.warning(str(self.certificate))
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / CERTIFICATE, self.certificate.to_dict())
        self.sculptor.end_task()
        self._rows.protect(self.sculptor, self.name or "", args)
        if self.sculptor.memory:
            self.sculptor.save_memory(args.output_dir)

    def _certify(self) -> None:
        assert self.sculptor is not None
        try:
            self.certificate = self.sculptor.verify(independent=self.independent)
        except RuntimeError:
            self.sculptor.undo_task()  # No step has changed anything.
            raise
        logger.info(str(self.certificate))

    def _resume(self, path: Path, optimizer: Optimizer | None) -> None:
        """Go on from `path`; the model has the weights of that moment already.

        Optimizer and wrappers were made for the coordinates of the task that began with the
        Trainer; these go on with the values of the saved ones.
        """
        assert self.sculptor is not None
        model = self.sculptor.model
        before = dict(self.sculptor.named_parameters())
        weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
        self.sculptor.undo_task()
        model.load_state_dict(weights)
        self._load(model, path)
        if optimizer is not None:
            for matrix in self.sculptor._running().matrices.values():
                if isinstance(matrix, CoordinateMatrix):
                    matrix.adopt(before[matrix.name])

    def _load(self, model: nn.Module, path: Path) -> None:
        """Take up the task that was saved in `path`, on a model with the weights of that moment."""
        weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
        left_out = find_targets(model, self.config).left_out
        start = time.perf_counter()
        try:
            self.sculptor = Sculptor.load(model, path)
        except FileNotFoundError as error:
            raise ValueError(
                f"{path.parent} was not finished, or not made with SculptCallback: {error}; resume "
                "from the checkpoint before it"
            ) from error
        if _settings(self.sculptor.config) != _settings(self.config):
            raise ValueError(
                f"{path} was made with another configuration, {self.sculptor.config}; this is "
                f"{self.config}"
            )
        _check_same_weights(model, weights, path)
        self._saved = path
        if self.table is None:
            rows = [TaskRow.of(matrix) for matrix in self.sculptor._running().matrices.values()]
            others = [name for name, _ in self.sculptor.named_parameters()][len(rows) :]
            seconds = time.perf_counter() - start
            self.table = TaskTable(self.name, rows, left_out, seconds, others)


def _settings(config: SculptConfig) -> dict[str, Any]:
    """What decides about the task; where subspaces are cached does not."""
    return config_to_json(replace(config, subspace_cache=None))


def _refuse_what_is_not_supported(args: Any, model: nn.Module) -> None:
    for name, dtype in (("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16)):
        weights = (p for p in model.parameters() if p.is_floating_point())
        if getattr(args, name, False) and any(p.dtype != dtype for p in weights):
            raise RuntimeError(
                f"SculptCallback does not work with {name}=True on this model, which the Trainer "
                f"would leave in {dtype}: the next task would start from rounded weights. Evaluate "
                f"under autocast, {name[:4]}=True, or load the model in {dtype}"
            )
    if args.n_gpu > 1:
        raise RuntimeError(
            f"SculptCallback trains on one device in each process; this one has {args.n_gpu} "
            "(torchrun --nproc-per-node makes a process for each, CUDA_VISIBLE_DEVICES=0 leaves "
            "one)"
        )
    if args.deepspeed:
        raise RuntimeError(
            f"SculptCallback does not work with deepspeed={args.deepspeed!r}, which replaces the "
            "optimizer; use fsdp with version 2, or DistributedDataParallel"
        )
    version = _fsdp_version(args)
    if version not in (None, 2):
        raise RuntimeError(
            f"SculptCallback does not work with FSDP version {version}, which flattens matrices "
            "away; set fsdp_config={'version': 2}, or fsdp_version: 2 for accelerate launch"
        )


def _fsdp_version(args: Any) -> int | None:
    """As the arguments of the Trainer say, or `accelerate launch`; None without FSDP."""
    if args.fsdp:
        return int((args.fsdp_plugin_args or {}).get("fsdp_version", 2))
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return int(os.environ.get("FSDP_VERSION", "1"))
    return None


def _processes(model: nn.Module) -> Processes:
    return Processes(None, device_of(next(model.parameters())))


def _saved_state(args: Any, step: int) -> Path:
    """What was saved beside the checkpoint that the Trainer resumes from; it does not say which."""
    places = [Path(args.output_dir) / f"checkpoint-{step}"]
    if isinstance(args.resume_from_checkpoint, str):
        places.insert(0, Path(args.resume_from_checkpoint))
    return next((place for place in places if (place / FOLDER).is_dir()), places[0]) / FOLDER


def _check_same_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    with _processes(model).as_one():
        for name, value in model.state_dict().items():
            if not torch.equal(local(value), local(weights[name])):
                raise ValueError(
                    f"{path} is not of the checkpoint that the Trainer loaded: {name} differs. Set "
                    "TrainingArguments(resume_from_checkpoint=...) to the directory that is resumed"
                )
