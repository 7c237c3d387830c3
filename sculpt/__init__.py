"""Continual full fine-tuning of language models without forgetting."""

from sculpt.certificate import Certificate
from sculpt.config import SculptConfig
from sculpt.sculptor import Sculptor

__version__ = "0.1.0"

__all__ = ["Certificate", "SculptConfig", "Sculptor"]
