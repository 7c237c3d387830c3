"""What earlier tasks learned stays: `protect="accumulate"`.

The first task finds `U_l`, `V_l` as ever. When a task ends, the singular vectors of its coordinates
`C = P S Qᵀ` tell where it learned: the leading directions `U_l P_q`, `V_l Q_q` that hold
`learned_energy` of `‖C‖²_F` join what is preserved, and the next task trains in what is left of
`U_l`, `V_l`. Nothing is decomposed again, and the leading directions of the weights before the
first task stay preserved. A layer that began with `t` trainable directions has `t` to give away.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sculpt.config import SculptConfig
from sculpt.distributed.processes import Processes
from sculpt.messages import SculptWarning, text_table
from sculpt.storage.files import replacing_file
from sculpt.task.bases import Bases
from sculpt.task.compact import CompactMatrix
from sculpt.task.matrix import Matrix
from sculpt.task.targets import Target
from sculpt_kernels import is_divided

FILE = "learned.safetensors"
FULL = "full: what earlier tasks learned takes all its trainable directions; frozen"


@dataclass
class Room:
    """The trainable directions of one layer, those of the first task.

    Attributes:
        U, V: `(..., m, t)`, `(..., n, t)`, orthonormal columns: first what was learned, then what
            is free.
        energies: `(u,)` float64: `S²` of each learned direction when it joined.
        owners: `(u,)` int64: the number of the task that learned it.
        uses: directions that each task so far took.
        share: of `‖W‖²_F` in the preserved directions of the first task.
    """

    U: Tensor
    V: Tensor
    energies: Tensor
    owners: Tensor
    uses: list[int]
    share: float

    @property
    def size(self) -> int:
        return self.U.shape[-1]

    @property
    def free(self) -> int:
        return self.size - len(self.energies)

    @property
    def typical(self) -> float:
        """Directions that a task takes, the mean so far."""
        return statistics.fmean(self.uses)

    @property
    def tasks_left(self) -> float:
        """How many more tasks like those so far find room; infinite where they took none."""
        return math.inf if self.typical == 0 else self.free / self.typical


@dataclass(frozen=True)
class Capacity:
    """How much room is left in every layer."""

    rooms: Mapping[str, Room]

    @property
    def tasks_left(self) -> float:
        """Tasks like those so far until half of the layers are full."""
        return statistics.median(room.tasks_left for room in self.rooms.values())

    @property
    def full(self) -> list[str]:
        return [name for name, room in self.rooms.items() if room.free == 0]

    def forecast(self) -> str:
        first = min(self.rooms, key=lambda name: self.rooms[name].tasks_left)
        return (
            f"{_about(self.tasks_left)} like these until half of the layers are full; "
            f"{_about(self.rooms[first].tasks_left)} for {first!r}, the first. "
            f"{len(self.full)} of {len(self.rooms)} layers are full."
        )

    def __str__(self) -> str:
        rows = [
            (
                name,
                str(room.size),
                " + ".join(map(str, room.uses)),
                str(len(room.energies)),
                str(room.free),
                f"{room.tasks_left:.1f}",
            )
            for name, room in self.rooms.items()
        ]
        header = ("matrix", "trainable", "taken by tasks", "held", "free", "tasks left")
        return f"{text_table(header, rows)}\n{self.forecast()}"


def _about(tasks: float) -> str:
    return "room for any number of tasks" if tasks == math.inf else f"room for about {tasks:.0f}"


class Learned:
    """The rooms of all layers; they change at the end of a task only."""

    def __init__(self, config: SculptConfig) -> None:
        self.config = config
        self.rooms: dict[str, Room] = {}

    def capacity(self) -> Capacity:
        """Raises `RuntimeError` before the end of the first task."""
        if not self.rooms:
            raise RuntimeError("no task has ended yet: nothing was learned")
        return Capacity(self.rooms)

    def begin(
        self, targets: list[Target], processes: Processes
    ) -> tuple[list[Target], list[Bases], dict[str, str]] | None:
        """What a task may train: targets with the ranks that are left, their bases, full layers.

        None for the first task, which chooses as ever.

        Raises:
            ValueError: the weights are divided, the targets are not those of before, or every layer
                is full.
        """
        if processes.size > 1 or any(is_divided(t.parameter) for t in targets):
            raise ValueError("protect='accumulate' works in one process, on whole matrices")
        if not self.rooms:
            return None
        known = {target.name: target for target in targets}
        if known.keys() != self.rooms.keys():
            odd = sorted(known.keys() ^ self.rooms.keys())[0]
            raise ValueError(f"what was learned is of other layers: {odd!r} is not in both")
        for name, target in known.items():
            wanted = [(*target.shape[:-2], size) for size in target.shape[-2:]]
            room = self.rooms[name]
            if [(*B.shape[:-2], B.shape[-2]) for B in (room.U, room.V)] != wanted:
                raise ValueError(f"what was learned does not fit the shape of {name!r}")
        chosen, bases, full = [], [], {}
        for name, target in known.items():
            room = self.rooms[name]
            if room.free == 0:
                full[name] = FULL
                continue
            k = min(target.shape[-2:])
            chosen.append(replace(target, preserved=k - room.free))
            held = len(room.energies)
            U, V = (B[..., held:].contiguous() for B in (room.U, room.V))
            bases.append(Bases(U, V, None, "none", room.share, "accumulated"))
        if not chosen:
            tasks = max(len(room.uses) for room in self.rooms.values())
            raise ValueError(
                f"every layer is full after {tasks} tasks, and nothing can train: a larger "
                "unfreeze_rank_ratio or a smaller learned_energy makes room for more"
            )
        if full:
            warnings.warn(
                f"{len(full)} of {len(self.rooms)} layers are full and frozen: {next(iter(full))}"
                + (", ..." if len(full) > 1 else ""),
                SculptWarning,
                stacklevel=4,
            )
        return chosen, bases, full

    @torch.no_grad()
    def add(self, matrices: Sequence[Matrix]) -> None:
        """Let what a task learned join what is preserved, before the matrices become plain."""
        for matrix in matrices:
            assert isinstance(matrix, CompactMatrix)
            before = self.rooms.get(matrix.name)
            self.rooms[matrix.name] = _joined(before, matrix, self.config.learned_energy)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a safetensors file."""
        found = {}
        for name, room in self.rooms.items():
            parts = {
                "U": room.U,
                "V": room.V,
                "energies": room.energies,
                "owners": room.owners,
                "uses": torch.tensor(room.uses),
                "share": torch.tensor(room.share, dtype=torch.float64),
            }
            found.update({f"{name}/{part}": tensor for part, tensor in parts.items()})
        return found

    def restore(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take what `tensors` gave."""
        self.rooms = {}
        for key in tensors:
            name, _, part = key.rpartition("/")
            if part == "U":
                U, V, energies, owners, uses, share = (
                    # In memory of its own: products round by where a file's tensors lie.
                    tensors[f"{name}/{part}"].clone()
                    for part in ("U", "V", "energies", "owners", "uses", "share")
                )
                self.rooms[name] = Room(
                    U.to(device), V.to(device), energies, owners, uses.tolist(), float(share)
                )

    def save(self, folder: Path) -> None:
        """Write `learned.safetensors`, atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        with replacing_file(folder / FILE) as temporary:
            parts = {k: t.detach().cpu().contiguous() for k, t in self.tensors().items()}
            save_file(parts, temporary)

    def load(self, folder: Path, device: torch.device) -> None:
        """Take what `save` wrote. Raises `FileNotFoundError` where there is nothing."""
        if not (folder / FILE).is_file():
            raise FileNotFoundError(f"{folder} has no {FILE}, which Learned.save writes")
        self.restore(load_file(folder / FILE), device)


def _joined(room: Room | None, matrix: CompactMatrix, energy: float) -> Room:
    """The room after a task: the free directions turned to where it learned, these counted in."""
    U, V = matrix.state.U, matrix.state.V
    assert U is not None
    assert V is not None
    P, S, Qt = torch.linalg.svd(matrix.state.scale * matrix.trained.detach().double())
    squares = S.square()
    total = squares.sum(-1, keepdim=True)
    taken = (squares.cumsum(-1) < energy * total).sum(-1) + 1
    taken = torch.where(total[..., 0] > 0, taken, 0)
    count = int(taken.max())
    mean = squares.reshape(-1, squares.shape[-1]).mean(0)[:count].cpu()
    turned = [(B.double() @ R).to(B.dtype) for B, R in ((U, P), (V, Qt.mT))]
    if room is None:
        none = torch.zeros(0, dtype=torch.float64)
        room = Room(U, V, none, none.long(), [], matrix.bases.energy)
    held = len(room.energies)
    return Room(
        torch.cat([room.U[..., :held], turned[0]], dim=-1),
        torch.cat([room.V[..., :held], turned[1]], dim=-1),
        torch.cat([room.energies, mean]),
        torch.cat([room.owners, torch.full((count,), len(room.uses))]),
        [*room.uses, count],
        room.share,
    )
