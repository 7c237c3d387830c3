"""What a run tells the services that its `loggers` name: numbers at optimizer steps.

Steps are counted over all tasks, so that a run that was killed and resumed goes on where it was: a
step that is done again is logged again, at the same place and with the same values.
"""

from __future__ import annotations

from sculpt.certificate.leak import Certificate
from sculpt.logs import Loggers, certificate_metrics, task_metrics
from sculpt.metrics import summary
from sculpt.runs.config import RunConfig
from sculpt.runs.directory import RunDirectory
from sculpt.runs.state import RunState
from sculpt.task.table import TaskRow


class RunLog:
    """The services of one run, from its start or resumption to `close`.

    Raises `ValueError` where a service cannot be reached.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        path = directory.path
        self._loggers = Loggers(config.loggers, path, run_name=path.resolve().name)

    def begun(self, state: RunState, rows: list[TaskRow]) -> None:
        """A task begins: what was chosen for its matrices, if anything was."""
        values = task_metrics(rows) if rows else {}
        self._loggers.log({"task": state.task, **values}, steps_done(state))

    def step(self, state: RunState, loss: float, lr: float, speed: float) -> None:
        """A step is done."""
        values = {"loss": loss, "learning_rate": lr, "tokens_per_second": speed}
        self._loggers.log(values, steps_done(state))

    def certified(self, state: RunState, certificate: Certificate | None) -> None:
        """A task has ended."""
        if certificate is not None:
            self._loggers.log(certificate_metrics(certificate), steps_done(state))

    def tested(self, state: RunState, names: list[str]) -> None:
        """All tasks seen so far were tested; `names` are those of all."""
        result = state.result
        values = {}
        for measure, matrix in (
            ("generated", result.generated),
            ("among_labels", result.among_labels),
        ):
            for name, score in zip(names, matrix[-1], strict=True):
                values[f"eval_{measure}/{name}"] = score
            seen = summary([row[: len(matrix)] for row in matrix])
            values[f"eval_{measure}/average_accuracy"] = seen.average_accuracy
            values[f"eval_{measure}/forgetting"] = seen.forgetting
        self._loggers.log(values, steps_done(state))

    def close(self) -> None:
        """Nothing more will be logged."""
        self._loggers.close()


def steps_done(state: RunState) -> int:
    """Optimizer steps of all tasks so far."""
    return sum(len(losses) for losses in state.result.losses)
