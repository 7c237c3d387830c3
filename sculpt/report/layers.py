"""What each layer got and what it has left: the files that a run wrote of it, for the page."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

from sculpt.runs.layer_files import RANKS, ROOM


@dataclass(frozen=True)
class Layers:
    """Of the last tasks that have them; "" for what is not there.

    ranks, room: number and name of the task. ranks_table, room_table: their texts.
    picture: of the ranks, as a `data:` address.
    """

    ranks: str = ""
    ranks_table: str = ""
    picture: str = ""
    room: str = ""
    room_table: str = ""


def layers_of(folder: Path) -> Layers | None:
    """Of a run directory; None where ranks do not adapt and tasks do not accumulate."""
    found: dict[str, str] = {}
    for name in (RANKS, ROOM):
        files = sorted((folder / name).glob("[!.]*.txt"))
        if files:
            found[name] = files[-1].stem
            found[f"{name}_table"] = files[-1].read_text(encoding="utf-8")
    picture = folder / RANKS / f"{found.get(RANKS)}.png"
    if picture.is_file():
        encoded = b64encode(picture.read_bytes()).decode("ascii")
        found["picture"] = f"data:image/png;base64,{encoded}"
    return Layers(**found) if found else None
