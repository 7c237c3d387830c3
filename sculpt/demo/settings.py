"""The settings of `sculpt demo`: presets, the user's choices, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sculpt.config import SculptConfig
from sculpt.data.config import DataConfig
from sculpt.models.load import check_directory
from sculpt.runs.config import CheckpointConfig, RunConfig, TrainingConfig, describe
from sculpt.runs.space import free_disk


class DemoError(RuntimeError):
    """The demo cannot run or go on; the message says why and what to do."""


METHODS = ("plain-low", "plain", "sculpt-weights", "sculpt")
PLAIN_LR = 2e-5
MAX_TEXT_TOKENS = 40
TEST_PER_TASK = 60


@dataclass(frozen=True)
class DemoSettings:
    """One run of the demo. How the presets were found is told in `docs/reference/demo.md`.

    quick: the small sentence encoder instead of the language model.
    model: a plain Hugging Face directory of a causal language model instead of the built-in one.
    out: run directory.
    methods: some of `METHODS`.
    ratio: trainable fraction of every matrix's directions.
    steps, lr: of every task; the learning rate is that of dense weights, for all methods but
        "plain-low", which has `PLAIN_LR`.
    """

    out: Path
    quick: bool = False
    model: Path | None = None
    seed: int = 0
    methods: Sequence[str] = METHODS
    ratio: float = 0.25
    steps: int = 30
    lr: float = 6e-5

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
        if not self.methods or not set(self.methods) <= set(METHODS):
            raise DemoError(
                f"--methods {','.join(self.methods)}: expected some of {','.join(METHODS)}"
            )
        try:
            self.runs(Path())
        except ValidationError as error:
            raise DemoError("\n".join(describe(item) for item in error.errors())) from error

    def runs(self, model: Path) -> dict[str, RunConfig]:
        """The run of each method on the directory `model`, by the method's name in the results."""
        return {
            self._name(method): RunConfig(
                model=model,
                model_kind="nearest" if self.quick else "causal",
                out=self.out / method,
                method=method.partition("-")[0],
                data=DataConfig(builtin="demo", test_rows=TEST_PER_TASK),
                training=TrainingConfig(
                    steps=self.steps,
                    lr=self._rate(method),
                    warmup_steps=min(5, self.steps // 2),  # Few steps still reach the full rate.
                    max_tokens=None,
                    max_text_tokens=MAX_TEXT_TOKENS,
                ),
                sculpt=SculptConfig(
                    unfreeze_rank_ratio=self.ratio,
                    subspaces="weights" if method == "sculpt-weights" else "auto",
                    seed=self.seed,
                ),
                checkpoint=CheckpointConfig(keep=0),  # Minutes long, so nobody resumes it.
                device="cpu",
                seed=self.seed,
            )
            for method in METHODS
            if method in self.methods
        }

    def _rate(self, method: str) -> float:
        return PLAIN_LR if method == "plain-low" else self.lr

    def _name(self, method: str) -> str:
        if method.startswith("plain"):
            digits, exponent = f"{self._rate(method):e}".split("e")
            return f"plain {float(digits):g}e{int(exponent)}"
        return "sculpt (weights)" if method == "sculpt-weights" else method


QUICK: dict[str, Any] = {"quick": True, "steps": 40, "lr": 2e-4}


def check_space(out: Path, model: Path) -> None:
    """Raise `DemoError` when the disk of `out` has no room for the final model."""
    weights = [*model.glob("*.safetensors"), *model.glob("*.bin")]
    needed = int(1.1 * sum(path.stat().st_size for path in weights)) + 20 * 2**20
    free = free_disk(out)
    if free < needed:
        raise DemoError(
            f"--out {out}: {free / 2**20:.0f} MB are free on its disk, about "
            f"{needed / 2**20:.0f} MB are needed for the final model"
        )
