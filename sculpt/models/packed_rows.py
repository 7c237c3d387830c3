"""Many rows in little memory: 8 bytes for a token that is read and learned."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import overload

from sculpt.models.encoding import Encoded


class PackedRows(Sequence[Encoded]):
    """The rows of a task, which become `Encoded` again when they are asked for.

    As tuples a token would take five times as much: a number of its own, and two places for it.
    """

    def __init__(self, rows: Iterable[Encoded] = ()) -> None:
        self._ids, self._labels = array("i"), array("i")
        self._id_ends, self._label_ends = array("q", [0]), array("q", [0])
        self._cut = array("i")
        self.extend(rows)

    def extend(self, rows: Iterable[Encoded]) -> None:
        """Add rows at the end."""
        for row in rows:
            self._ids.extend(row.ids)
            self._labels.extend(row.labels)
            self._id_ends.append(len(self._ids))
            self._label_ends.append(len(self._labels))
            self._cut.append(row.cut)

    @property
    def cut(self) -> int:
        """How many rows lost a part of their passage."""
        return sum(cut > 0 for cut in self._cut)

    def __len__(self) -> int:
        return len(self._cut)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...

    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...

    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        ids = self._ids[self._id_ends[place] : self._id_ends[place + 1]]
        labels = self._labels[self._label_ends[place] : self._label_ends[place + 1]]
        return Encoded(tuple(ids), tuple(labels), self._cut[place])
