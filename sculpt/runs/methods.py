"""Which methods there are, and what each of them can be told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sculpt.data.config import Count, NotNegative, Positive, Section

Method = Literal[
    "plain",
    "sculpt",
    "lora",
    "osf",
    "olora",
    "replay",
    "ewc",
    "l2sp",
    "frozen",
    "multitask",
]


class LoraConfig(Section):
    """LoRA. rank: of every matrix, 16 where nothing is said. scaling: PEFT's lora_alpha / r."""

    rank: Count | None = None
    scaling: Positive = 2.0


class OLoraConfig(LoraConfig):
    """O-LoRA. orthogonality: weight of its loss, 0.5 as in the paper."""

    orthogonality: NotNegative = 0.5


class ReplayConfig(Section):
    """Replay. rows: that are kept of each earlier task; share: of each batch that is drawn from
    them."""

    rows: Count = 32
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25


class EwcConfig(Section):
    """EWC. strength: the paper's lambda; rows: of each task, for the mean that is its Fisher."""

    strength: NotNegative = 1e5
    rows: Count = 64


class L2SpConfig(Section):
    """L2-SP. strength: alpha, on trained matrices; head_strength: beta, on a new head."""

    strength: NotNegative = 0.1
    head_strength: NotNegative = 0.01


SECTIONS = ("lora", "olora", "replay", "ewc", "l2sp")
"""Methods with a section of their own in the run's configuration."""
