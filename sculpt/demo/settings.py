"""The settings of `sculpt demo`: presets, the user's choices, and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sculpt.config import SculptConfig
from sculpt.data.config import DataConfig
from sculpt.models.load import check_directory
from sculpt.runs.config import CheckpointConfig, RunConfig, TrainingConfig, describe
from sculpt.runs.space import free_bytes


class DemoError(RuntimeError):
    """The demo cannot run or go on; the message says why and what to do."""


@dataclass(frozen=True)
class DemoSettings:
    """One run of the demo. How the presets were found is told in `docs/reference/demo.md`.

    quick: the small sentence encoder instead of the language model.
    model: a plain Hugging Face directory of a causal language model instead of the built-in one.
    out: run directory.
    ratio: trainable fraction of every matrix's singular directions.
    steps, batch_size, lr, warmup_steps: see `TrainingConfig`; `lr` is that of dense weights, for
        both methods.
    max_text_tokens: where texts are cut.
    train_per_task, test_per_task: examples drawn.
    """

    out: Path
    quick: bool = False
    model: Path | None = None
    seed: int = 0
    ratio: float = 0.25
    steps: int = 30
    batch_size: int = 8
    lr: float = 6e-5
    warmup_steps: int = 5
    max_text_tokens: int = 40
    train_per_task: int = 600
    test_per_task: int = 60

    def __post_init__(self) -> None:
        if self.quick and self.model is not None:
            raise DemoError(
                f"--model {self.model} and --quick exclude each other: "
                "--quick runs the built-in encoder"
            )
        if self.model is not None:
            check_directory(self.model)
        if self.seed < 0:
            raise DemoError(f"--seed {self.seed}: expected 0 or more")
        try:
            self.run_config("sculpt", Path())
        except ValidationError as error:
            raise DemoError("\n".join(describe(item) for item in error.errors())) from error

    def run_config(self, method: str, model: Path) -> RunConfig:
        """The run of one method on the directory `model`."""
        return RunConfig(
            model=model,
            model_kind="nearest" if self.quick else "causal",
            out=self.out / method,
            method=method,
            data=DataConfig(
                builtin="demo", train_rows=self.train_per_task, test_rows=self.test_per_task
            ),
            training=TrainingConfig(
                steps=self.steps,
                batch_size=self.batch_size,
                lr=self.lr,
                # Few steps still reach the full rate.
                warmup_steps=min(self.warmup_steps, self.steps // 2),
                max_tokens=None,
                max_text_tokens=self.max_text_tokens,
            ),
            sculpt=SculptConfig(unfreeze_rank_ratio=self.ratio, seed=self.seed),
            # Minutes long, so nobody resumes it; only the model that sculpt trained is of interest.
            checkpoint=CheckpointConfig(keep=0, models="last" if method == "sculpt" else "none"),
            device="cpu",
            seed=self.seed,
        )


QUICK: dict[str, Any] = {"quick": True, "steps": 40, "lr": 5e-5}


def check_space(out: Path, model: Path) -> None:
    """Raise `DemoError` when the disk of `out` has no room for the final model."""
    weights = [*model.glob("*.safetensors"), *model.glob("*.bin")]
    needed = int(1.1 * sum(path.stat().st_size for path in weights)) + 20 * 2**20
    free = free_bytes(out)
    if free < needed:
        raise DemoError(
            f"--out {out}: {free / 2**20:.0f} MB are free on its disk, about "
            f"{needed / 2**20:.0f} MB are needed for the final model"
        )
