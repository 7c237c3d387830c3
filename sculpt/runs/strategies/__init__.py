"""The methods of a run, by the name that `method:` gives them."""

from __future__ import annotations

from collections.abc import Callable

from sculpt.runs.method import Advance, Begun, Cost, Setting, Strategy
from sculpt.runs.plain import Frozen, MultiTask, Plain
from sculpt.runs.sculpting import Sculpt
from sculpt.runs.strategies.adapters import Lora, Osf
from sculpt.runs.strategies.olora import OLora
from sculpt.runs.strategies.penalties import Ewc, L2Sp
from sculpt.runs.strategies.replay import Replay

__all__ = ["STRATEGIES", "Advance", "Begun", "Cost", "Setting", "Strategy"]

STRATEGIES: dict[str, Callable[[Setting], Strategy]] = {
    "plain": Plain,
    "sculpt": Sculpt,
    "lora": Lora,
    "osf": Osf,
    "olora": OLora,
    "replay": Replay,
    "ewc": Ewc,
    "l2sp": L2Sp,
    "frozen": Frozen,
    "multitask": MultiTask,
}
