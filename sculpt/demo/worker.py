"""One method in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from sculpt.demo.settings import DemoError, DemoSettings
from sculpt.demo.tasks import demo_tasks
from sculpt.files import replacing_directory
from sculpt.learner import Learner
from sculpt.strategies import STRATEGIES
from sculpt.text_tasks import Task
from sculpt.training import train_sequence


@dataclass(frozen=True)
class Failure:
    """Why a method stopped."""

    message: str


def work(method: str, settings: DemoSettings, model: Path, connection: Connection) -> None:
    """Train the sequence with `method`, sending `Progress` and at last `MethodResult` or `Failure`.

    The final model is saved as `model/` in the run directory when the method is sculpt.
    """
    _quiet_transformers()
    try:
        tasks = demo_tasks(
            settings.seed,
            train_per_task=settings.train_per_task,
            test_per_task=settings.test_per_task,
        )
        learner = load(settings, model, tasks)
        strategy = STRATEGIES[method](learner.model, settings.sculpt_config())
        result = train_sequence(learner, tasks, strategy, settings.schedule(), connection.send)
        if method == "sculpt":
            save(learner, settings.out / "model")
        connection.send(result)
    except (BrokenPipeError, ConnectionResetError):
        return  # The parent is gone: nobody is left to tell.
    except (DemoError, RuntimeError, ValueError, TypeError, OSError) as error:
        connection.send(Failure(str(error)))


def load(settings: DemoSettings, model: Path, tasks: list[Task]) -> Learner:
    """The learner that `settings` names, from the plain directory `model`."""
    if settings.quick:
        from sculpt.encoder import EncoderLearner

        return EncoderLearner.from_directory(model, tasks, max_text_tokens=settings.max_text_tokens)
    from sculpt.causal import CausalLearner

    return CausalLearner.from_directory(model, max_text_tokens=settings.max_text_tokens)


def save(learner: Learner, path: Path) -> None:
    """Write the model as a plain directory; nothing is left of a failed attempt."""
    try:
        with replacing_directory(path) as temporary:
            learner.save(temporary)
    except Exception as error:  # safetensors reports a full disk by an exception of its own
        raise DemoError(
            f"the final model could not be saved to {path}: {error}. Is the disk full?"
        ) from error


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
