"""Checkpoints: whole or not there, and every change to them is noticed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sculpt.storage.checkpoint import CheckpointError, Checkpoints, tensors_part
from sculpt.storage.nested import flatten, random_states, set_random_states, unflatten


def write(folder: Path, value: float = 1.0, keep: int = 2) -> Path:
    """One more checkpoint, of a tensor that changes and one that does not."""
    checkpoints = Checkpoints(folder, keep)
    checkpoints.write(
        {"value": value},
        {
            "moving.safetensors": tensors_part(lambda: {"x": torch.tensor([value])}),
            "fixed.safetensors": tensors_part(lambda: {"y": torch.ones(3)}, version="1"),
        },
    )
    return folder / checkpoints.names()[-1]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, 2).read() is None
    for value in (1.0, 2.0, 3.0):
        write(tmp_path, value)
    assert Checkpoints(tmp_path, 2).names() == ["000002", "000003"]
    loaded = Checkpoints(tmp_path, 2).read()
    assert loaded is not None
    assert loaded.state == {"value": 3.0}
    assert loaded.tensors("moving.safetensors")["x"].tolist() == [3.0]
    assert loaded.tensors("fixed.safetensors")["y"].tolist() == [1.0, 1.0, 1.0]
    fixed = [tmp_path / name / "fixed.safetensors" for name in ("000002", "000003")]
    assert fixed[0].samefile(fixed[1])
    assert not list(tmp_path.glob(".*"))
    assert not list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.bin"))


def test_a_half_written_checkpoint_is_not_seen_and_is_removed(tmp_path: Path) -> None:
    write(tmp_path)
    half = tmp_path / ".000002.tmp"
    half.mkdir()
    (half / "manifest.json").write_text("{")
    loaded = Checkpoints(tmp_path, 2).read()
    assert loaded is not None
    assert loaded.path.name == "000001"
    assert not half.exists()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("moving.safetensors", lambda data: data[:-1], r"has \d+ bytes, expected \d+; remove .*1"),
        ("moving.safetensors", lambda data: data[:-1] + b"x", "was changed after it was written"),
        ("state.json", lambda data: data.replace(b"1", b"9"), "was changed"),
        ("fixed.safetensors", None, r"fixed\.safetensors is missing"),
        ("manifest.json", None, r"is no checkpoint: manifest\.json is missing"),
        ("manifest.json", lambda data: data[:-9], r"manifest\.json is damaged"),
        ("manifest.json", lambda data: b'{"format": 1, "weights": []}', "it lists no files"),
        ("manifest.json", lambda data: data.replace(b'"format": 1', b'"format": 99'), "format 99"),
    ],
)
def test_every_damage_is_named(tmp_path: Path, name: str, damage: Any, message: str) -> None:
    file = write(tmp_path) / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path, 2).read()


def test_a_checkpoint_that_fails_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path)

    def fail() -> dict[str, torch.Tensor]:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        Checkpoints(tmp_path, 2).write({}, {"bad.safetensors": tensors_part(fail)})
    assert [path.name for path in tmp_path.iterdir()] == ["000001"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_nested_values_come_back_as_they_were(value: Any) -> None:
    layout, tensors = flatten(value)
    again = unflatten(json.loads(json.dumps(layout)), tensors)
    assert again == value
    assert repr(again) == repr(value)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_any_optimizer_comes_back_without_pickle(kind: Any) -> None:
    def made() -> tuple[torch.nn.Parameter, Any]:
        weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return weight, kind([weight], lr=0.1, **options)

    def step(weight: torch.nn.Parameter, optimizer: Any) -> None:
        weight.grad = weight.detach() ** 2
        optimizer.step()

    one, optimizer = made()
    step(one, optimizer)
    layout, tensors = flatten(optimizer.state_dict())
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # as a file would
    two, again = made()
    two.data.copy_(one.data)
    again.load_state_dict(unflatten(json.loads(json.dumps(layout)), tensors))
    step(one, optimizer)
    step(two, again)
    assert torch.equal(one, two)
    with pytest.raises(TypeError, match=r"state\.a is a set"):
        flatten({"a": {1}})


def test_all_generators_go_on_where_they_were() -> None:
    random.gauss(0, 1)  # leaves a second value behind
    np.random.normal()  # noqa: NPY002 - the global generator is what is tested
    states = {name: state.clone() for name, state in random_states().items()}

    def drawn() -> tuple[Any, ...]:
        legacy = np.random.normal(size=3).tolist()  # noqa: NPY002
        return random.gauss(0, 1), random.random(), legacy, torch.rand(3).tolist()

    first = drawn()
    assert drawn() != first
    set_random_states(states)
    assert drawn() == first
