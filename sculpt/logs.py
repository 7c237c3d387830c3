"""Metrics to TensorBoard, Weights & Biases, MLflow and others, by name.

The services are reached through the integrations that transformers has for its own Trainer, so
everything that configures them there (`WANDB_PROJECT`, `MLFLOW_TRACKING_URI`,
`TENSORBOARD_LOGGING_DIR`, ...) works here too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sculpt.certificate.leak import Certificate
from sculpt.messages import did_you_mean
from sculpt.task.table import TaskRow


class Loggers:
    """Services by name; every value that is logged goes to all of them.

        loggers = Loggers(["tensorboard"], Path("runs/one"), run_name="one")
        loggers.log({"loss": 0.3}, step=10)
        loggers.close()

    Args:
        names: e.g. `"tensorboard"`, `"wandb"`, `"mlflow"`; none is allowed.
        out: run directory, where those that keep files keep them.
        run_name: under which the services show the run.
        arguments: the `TrainingArguments` of a Trainer that logs there itself: its runs are joined,
            and left for it to end.

    Raises:
        ValueError: a name is unknown, or its package is not installed.
    """

    def __init__(
        self,
        names: Sequence[str],
        out: Path,
        *,
        run_name: str | None = None,
        arguments: Any = None,
    ) -> None:
        self._services: dict[str, Any] = {}
        self._joined = arguments is not None
        self._arguments = arguments
        if not names:
            return
        from transformers import TrainerControl, TrainerState

        services = _services(names)
        if arguments is None:
            from transformers import TrainingArguments

            self._arguments = TrainingArguments(
                output_dir=str(out), run_name=run_name, report_to=list(names)
            )
        self._state = TrainerState(is_world_process_zero=True, is_local_process_zero=True)
        self._control = TrainerControl()
        for name, service in services.items():
            if name == "tensorboard" and service.logging_dir is None:
                service.logging_dir = str(out / "runs" / "sculpt")
            self._services[name] = service
        self._tell("on_train_begin", model=None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers at an optimizer step; those that are not finite are left out."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if self._services and finite:
            self._state.global_step = step
            self._tell("on_log", logs=finite, model=None)

    def close(self) -> None:
        """End the runs that were begun here; nothing can be logged afterwards."""
        if not self._joined:
            self._tell("on_train_end", model=None)
        elif (board := self._services.get("tensorboard")) is not None:
            board.on_train_end(self._arguments, self._state, self._control)
        self._services = {}

    def _tell(self, event: str, **more: Any) -> None:
        for service in self._services.values():
            getattr(service, event)(self._arguments, self._state, self._control, **more)


def check_loggers(names: Sequence[str]) -> None:
    """Raise `ValueError` where `Loggers` cannot be made of these names; no run begins anywhere."""
    if names:
        _services(names)


def check_names(names: Sequence[str]) -> None:
    """Raise `ValueError` for a name that there is not, installed or not."""
    if not names:
        return
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            raise ValueError(
                f"no logger is called {name!r}{did_you_mean(name, known) or '.'} "
                f"There are: {', '.join(sorted(known))}"
            )


def _services(names: Sequence[str]) -> dict[str, Any]:
    from transformers.integrations import integration_utils

    check_names(names)
    known = integration_utils.INTEGRATION_TO_CALLBACK
    services = {}
    for name in names:
        try:
            if find_spec("accelerate") is None:
                raise ImportError("TrainingArguments need the package accelerate")
            services[name] = known[name]()
        except (RuntimeError, ImportError) as error:
            raise ValueError(f"logging to {name!r} is not possible here: {error}") from error
    return services


def task_metrics(rows: Sequence[TaskRow]) -> dict[str, float]:
    """What begins a task, as numbers for services that log."""
    return {
        "sculpt/matrices": len(rows),
        "sculpt/trainable_elements": sum(row.trainable_elements for row in rows),
        "sculpt/mean_preserved_rank": sum(row.preserved for row in rows) / len(rows),
        "sculpt/mean_energy_kept": sum(row.energy for row in rows) / len(rows),
    }


def certificate_metrics(certificate: Certificate) -> dict[str, float]:
    """What ends a task, as numbers for services that log."""
    worst = certificate.worst
    return {
        "sculpt/worst_leak": worst.leak,
        "sculpt/worst_leak_limit": worst.limit,
        "sculpt/certificate_holds": float(certificate.ok),
        "sculpt/largest_relative_change": max(row.change for row in certificate.rows),
    }
