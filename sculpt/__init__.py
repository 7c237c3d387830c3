"""Continual full fine-tuning of language models in trailing singular subspaces."""

from typing import TYPE_CHECKING, Any

# Before all else: other modules tell by it that this package is the one that they belong to.
__distribution__ = "sculpt-kernels"

from sculpt.adaptive.config import AdaptiveRanks
from sculpt.certificate.leak import Certificate
from sculpt.config import SculptConfig
from sculpt.data.replay import Replay
from sculpt.sculptor import Sculptor
from sculpt.task.guards import abandon

if TYPE_CHECKING:
    from sculpt.runs.config import RunConfig
    from sculpt.runs.start import resume, run
    from sculpt.trainer import SculptCallback

__version__ = "0.1.0"

__all__ = [
    "AdaptiveRanks",
    "Certificate",
    "Replay",
    "RunConfig",
    "SculptCallback",
    "SculptConfig",
    "Sculptor",
    "abandon",
    "resume",
    "run",
]

# Imported when they are used: they bring pydantic, rich and transformers along.
_LATE = {
    "RunConfig": "sculpt.runs.config",
    "SculptCallback": "sculpt.trainer",
    "run": "sculpt.runs.start",
    "resume": "sculpt.runs.start",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'sculpt' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATE[name]), name)
