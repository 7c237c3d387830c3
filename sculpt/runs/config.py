"""What a run is: one typed object, the same from Python, from YAML and from a run directory.

pydantic, which typer brings along, checks types, finds unknown fields and says where; by hand this
would be a module of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    SerializeAsAny,
    Strict,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from sculpt.config import SculptConfig
from sculpt.data.config import (
    Count,
    DataConfig,
    FilePath,
    Names,
    NotNegative,
    Positive,
    Section,
)
from sculpt.data.replay import Replay
from sculpt.logs import check_names
from sculpt.runs.methods import method_class


class TrainingConfig(Section):
    """Length and pace of every task.

    steps or epochs: optimizer steps of each task, or passes over its rows (1 without either).
    batch_size: rows in a step; accumulate: in how many parts they pass through the model.
    lr: learning rate of AdamW on dense weights, rising over `warmup_steps`; then constant, or
        falling to zero by `schedule` over what is left of the task.
    max_grad_norm: gradients are scaled down to this norm.
    max_tokens: of a row; max_text_tokens: of its passage. What is longer loses the passage's tail.
    order: "shuffled", or "bucketed": rows of similar length share a batch.
    packing: no padding: the rows of a batch in one sequence (causal language models).
    dropout: as the model's configuration says; off by default.
    """

    steps: Count | None = None
    epochs: Positive | None = None
    batch_size: Count = 8
    accumulate: Count = 1
    lr: Positive = 1e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: NotNegative = 0.0
    betas: Annotated[tuple[float, float], Strict(False)] = (0.9, 0.999)
    eps: Positive = 1e-8
    max_grad_norm: Positive | None = None
    max_tokens: Annotated[int, Field(ge=2)] | None = 512
    max_text_tokens: Count | None = None
    order: Literal["shuffled", "bucketed"] = "shuffled"
    packing: bool = False
    dropout: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs} exclude each other")
        if self.steps is not None and self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps}, expected 0 to steps={self.steps}")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate={self.accumulate}, expected at most batch_size={self.batch_size}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}, expected two numbers from 0 to below 1")
        return self

    def steps_for(self, rows: int, replayed: int = 0) -> int:
        """Optimizer steps of a task with so many training rows.

        replayed: how many rows of a step are those of earlier tasks.
        """
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or 1.0) * rows / (self.batch_size - replayed)))

    def factor(self, step: int, steps: int) -> float:
        """Share of `lr` in step `step`, counted from 1, of `steps`."""
        warm = min(1.0, step / (self.warmup_steps + 1))
        if self.schedule == "constant" or step <= self.warmup_steps:
            return warm
        gone = (step - 1 - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return 1.0 - gone if self.schedule == "linear" else (1.0 + math.cos(math.pi * gone)) / 2


class ReplayConfig(Section):
    """Rows of earlier tasks among those of a task; see `sculpt.data.replay`.

    rows: how many are kept of each task. share: of each batch that they are.
    """

    rows: Count
    share: Annotated[float, Field(gt=0, lt=1)]


class EvaluationConfig(Section):
    """How models are tested after each task.

    batch_size: rows at once; max_new_tokens: where a free answer ends.
    lm_eval: tasks of `lm-eval`, measured before the first and after the last task;
    lm_eval_limit: examples of each.
    """

    batch_size: Count = 24
    max_new_tokens: Count = 64
    lm_eval: Names = ()
    lm_eval_limit: Count | None = None


class CheckpointConfig(Section):
    """What is kept on disk while a run goes on.

    every_steps: between two checkpoints of a task; there is one at each change of phase too.
    keep: how many of the newest stay; 0 writes none, and a run that is resumed begins anew.
    models: which plain models are saved: of the "last" task, of "each" task, or "none".
    memory: save beside each of them what its tasks use, for runs that go on from it; with exact
        factors that is several times the size of the model.
    """

    every_steps: Count = 100
    keep: Annotated[int, Field(ge=0)] = 2
    models: Literal["last", "each", "none"] = "last"
    memory: bool = False


class RunConfig(Section):
    """A task sequence, trained by one method.

    Paths are absolute here: `~` is expanded, and relative ones start at the current folder, or at
    that of the YAML file that they are in.

    model: a Hugging Face directory. model_kind: how it answers; "auto" is told by its architecture.
    out: the run directory, new or empty.
    method: "sculpt", "plain", "multitask", or the import path of a class, see
        `sculpt.runs.method`.
    options: what that class can be told.
    sculpt: fields of `SculptConfig`; the methods take their matrices from it too.
    memory: what tasks before this run use, which the model or `Sculptor.save_memory` has beside it.
    calibration_rows: of each task: at its begin its directions are compared with what earlier tasks
        need, at its end they join that; ranks that adapt to data take them from the task before.
    replay: rows of earlier tasks in every batch; none where it is empty.
    dtype: of the weights. device: "auto" is a GPU where there is one. seed: of everything random.
    certificate: "complement" is cheap; "independent" decomposes every weight afresh in float64, and
        needs `sculpt.subspaces` of "weights".
    loggers: services that are told loss, scores and leaks: "tensorboard", "wandb", "mlflow", ...
    """

    model: FilePath
    out: FilePath
    data: DataConfig
    model_kind: Literal["auto", "causal", "seq2seq", "classification", "nearest"] = "auto"
    method: str = "sculpt"
    options: SerializeAsAny[Section] = Field(default_factory=dict, validate_default=True)
    training: TrainingConfig = TrainingConfig()
    sculpt: SculptConfig = Field(SculptConfig(), validate_default=False)
    memory: FilePath | None = None
    calibration_rows: Count = 64
    replay: ReplayConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    certificate: Literal["complement", "independent"] = "complement"
    seed: Annotated[int, Field(ge=0)] = 0
    loggers: Names = ()

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        method_class(value)
        return value

    @field_validator("options", mode="before")
    @classmethod
    def _of_the_method(cls, value: Any, info: ValidationInfo) -> Any:
        if "method" not in info.data:  # wrong, which is said
            return Section()
        return method_class(info.data["method"]).Options.model_validate(value)

    @field_validator("sculpt", mode="before")
    @classmethod
    def _sculpt_config(cls, value: Any) -> Any:
        """A mapping as the checked object, which raises with the name of its field."""
        if not isinstance(value, Mapping):
            return value
        try:
            return SculptConfig(**value)
        except TypeError as error:  # pydantic passes on nothing but ValueError
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _can_protect(self) -> Self:
        if self.method != "sculpt":
            wanted = {"memory": self.memory, "checkpoint.memory": self.checkpoint.memory}
            for name in (name for name, value in wanted.items() if value):
                raise ValueError(f"{name} is for method='sculpt'; got method={self.method!r}")
            return self
        subspaces = self.sculpt.subspaces
        if subspaces == "weights" and (self.memory or self.checkpoint.memory):
            raise ValueError(
                "memory is what earlier tasks use, which sculpt.subspaces='weights' does not ask "
                "for; use sculpt.subspaces='auto'"
            )
        if subspaces == "curvature" and self.memory is None:
            raise ValueError(
                "sculpt.subspaces='curvature' needs something to protect in the first task: name "
                "the memory of an earlier run, or use sculpt.subspaces='auto'"
            )
        if self.certificate == "independent" and subspaces != "weights":
            raise ValueError(
                "certificate='independent' decomposes weights, and from the second task on "
                f"subspaces={subspaces!r} come from what earlier tasks use; use "
                "certificate='complement', or sculpt.subspaces='weights'"
            )
        return self

    @model_validator(mode="after")
    def _replays_some(self) -> Self:
        replay = self.replayed()
        if replay is not None:
            try:
                replay.of_batch(self.training.batch_size)
            except ValueError as error:
                raise ValueError(f"replay.{error} (training.batch_size)") from None
        return self

    def replayed(self) -> Replay[Any] | None:
        """What keeps rows of earlier tasks, none of them yet; None without `replay`."""
        replay = self.replay
        return None if replay is None else Replay(replay.rows, replay.share, seed=self.seed)

    @field_validator("loggers")
    @classmethod
    def _known_loggers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        check_names(value)
        return value

    @field_serializer("sculpt")
    def _plain_sculpt(self, value: SculptConfig) -> dict[str, Any]:
        found = {name: item for name, item in vars(value).items() if item is not None}
        if value.ranks is not None:
            found["ranks"] = {n: item for n, item in vars(value.ranks).items() if item is not None}
        return found


def describe(item: ErrorDetails, field: str | None = None) -> str:
    """One mistake in one line: field, value, and what is wrong."""
    field = ".".join(str(part) for part in item["loc"]) if field is None else field
    message, given = item["msg"], item.get("input")
    if item["type"] == "value_error":
        message = message.removeprefix("Value error, ")
    else:
        message = message[:1].lower() + message[1:]
    shown = "" if isinstance(given, dict | list | BaseModel) else f"={given!r}"
    return f"{field}{shown}: {message}"
