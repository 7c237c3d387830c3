"""What training a model would cost, before anything is spent: `sculpt inspect` and its function."""

from sculpt.inspection.estimate import inspect_model
from sculpt.inspection.result import Inspection

__all__ = ["Inspection", "inspect_model"]
