"""What tasks have learned stays, layers run out of room, and nothing of that is silent."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sculpt import SculptConfig, Sculptor
from sculpt_kernels import split

ACCUMULATE = {"protect": "accumulate", "unfreeze_rank_ratio": 0.5}


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 48, bias=False), nn.Tanh(), nn.Linear(48, 32)).to(dtype)


def learn(sculptor: Sculptor, name: str, rank: int = 2, seed: int = 0, size: float = 0.1) -> None:
    """A task that learns in few directions: coordinates of low rank, as if they were trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, C in sculptor.named_parameters():
            *batch, r, s = C.shape
            A = torch.randn(*batch, r, min(rank, r), generator=generator).to(C)
            B = torch.randn(*batch, min(rank, s), s, generator=generator).to(C)
            C.copy_(size * A @ B)
        sculptor.update_weights()
    assert sculptor.verify().ok


def stream(sculptor: Sculptor, tasks: int, **how) -> None:
    for task in range(tasks):
        sculptor.begin_task(name=str(task))
        learn(sculptor, str(task), seed=task, **how)
        sculptor.end_task()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().double() for n, p in model.named_parameters() if p.ndim == 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_later_task_leaves_all_that_was_learned_and_the_first_leading_subspace(dtype) -> None:
    model = small_model(dtype)
    config = SculptConfig(**ACCUMULATE, learned_energy=0.999999)
    sculptor = Sculptor(model, config)
    first = weights(copy.deepcopy(model))
    protected = {}
    for name, W in first.items():
        high = split(W, rank=min(W.shape) // 2, part="high")
        protected[name] = [(high.U, high.V)]
    for task in range(5):
        before = {name: W.clone() for name, W in weights(model).items()}
        sculptor.begin_task()
        # Coordinates that fill all that is free, but for the truncation: nothing else is left.
        learn(sculptor, str(task), seed=task)
        sculptor.end_task()
        unit = torch.finfo(dtype).eps / 2
        for name, W in weights(model).items():
            delta = W - before[name]
            floor = unit * W.norm() / delta.norm()
            for U, V in protected[name]:
                assert (U.mT @ delta).norm() / delta.norm() < max(1e-6, 2 * floor)
                assert (delta @ V).norm() / delta.norm() < max(1e-6, 2 * floor)
            # Its own subspace, independently of what the package kept of it.
            P, S, Q = torch.linalg.svd(delta, full_matrices=False)
            assert S[2] / S[0] < 1e-4
            protected[name].append((P[:, :2], Q[:2].mT))
    taken = {name: room.uses for name, room in sculptor.learned.rooms.items()}
    assert taken == {"0": [2] * 5, "2": [2] * 5}


def test_only_what_holds_the_energy_joins() -> None:
    model = small_model()
    sculptor = Sculptor(model, SculptConfig(**ACCUMULATE, learned_energy=0.9))
    sculptor.begin_task()
    with torch.no_grad():
        for _, C in sculptor.named_parameters():
            C.zero_()
            # Squares 16, 9, 1, 1 of 27: two hold 0.926, one 0.593.
            for index, value in enumerate((4.0, -3.0, 1.0, 1.0)):
                C[index, 3 - index] = value
        sculptor.update_weights()
    U = {name: matrix.state.U.clone() for name, matrix in sculptor._task.matrices.items()}
    scale = {name: matrix.state.scale**2 for name, matrix in sculptor._task.matrices.items()}
    sculptor.end_task()
    for name, room in sculptor.learned.rooms.items():
        assert room.uses == [2]
        assert room.energies.tolist() == pytest.approx([16.0 * scale[name], 9.0 * scale[name]])
        # The left singular vectors of C are unit vectors: the first two columns of U.
        assert torch.allclose((U[name][:, :2].mT @ room.U[:, :2]).abs(), torch.eye(2), atol=1e-5)


def test_the_weights_learned_stay_and_the_free_room_shrinks() -> None:
    sculptor = Sculptor(small_model(), SculptConfig(**ACCUMULATE))
    table = sculptor.begin_task()
    assert [row.trainable_rank for row in table.rows] == [20, 16]
    learn(sculptor, "0")
    with pytest.raises(RuntimeError, match="no task has ended yet"):
        sculptor.learned.capacity()
    sculptor.end_task()
    table = sculptor.begin_task()
    assert [row.trainable_rank for row in table.rows] == [18, 14]
    assert [row.preserved for row in table.rows] == [22, 18]
    assert {row.method for row in table.rows} == {"accumulated"}
    assert math.isclose(table.rows[0].energy, sculptor.learned.rooms["0"].share)


def test_the_forecast_is_what_then_happens_on_a_stream() -> None:
    sculptor = Sculptor(small_model(), SculptConfig(**ACCUMULATE, learned_energy=0.999999))
    stream(sculptor, 2)
    capacity = sculptor.learned.capacity()
    assert [room.tasks_left for room in capacity.rooms.values()] == [8.0, 6.0]
    assert "room for about 7 like these" in capacity.forecast()
    assert "room for about 6 for '2', the first" in capacity.forecast()
    assert "2 + 2" in str(capacity)
    stream(sculptor, 6)
    assert sculptor.learned.capacity().full == ["2"]


def test_a_full_layer_is_frozen_and_named_and_a_full_stream_is_an_error() -> None:
    model = small_model()
    sculptor = Sculptor(model, SculptConfig(**ACCUMULATE, learned_energy=0.999999))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream(sculptor, 8)
    before = weights(copy.deepcopy(model))
    with pytest.warns(UserWarning, match="1 of 2 layers are full and frozen: 2"):
        table = sculptor.begin_task()
    assert [row.name for row in table.rows] == ["0"]
    assert table.left_out["2"].startswith("full: what earlier tasks learned")
    assert not model[2].weight.requires_grad
    learn(sculptor, "9")
    sculptor.end_task()
    after = weights(model)
    assert torch.equal(after["2.weight"], before["2.weight"])
    assert not torch.equal(after["0.weight"], before["0.weight"])
    with pytest.warns(UserWarning, match="full and frozen"):
        stream(sculptor, 1)
    with pytest.raises(ValueError, match="every layer is full after 10 tasks"):
        sculptor.begin_task()


def test_a_layer_that_learned_nothing_takes_no_room() -> None:
    sculptor = Sculptor(small_model(), SculptConfig(**ACCUMULATE))
    sculptor.begin_task()
    sculptor.end_task()
    capacity = sculptor.learned.capacity()
    assert all(room.uses == [0] for room in capacity.rooms.values())
    assert "room for any number of tasks" in capacity.forecast()


def test_stacks_of_matrices_have_room_in_common() -> None:
    class TinyExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 20, 16))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.up.mT).sum()

    torch.manual_seed(0)
    model = nn.Sequential(TinyExperts())
    sculptor = Sculptor(model, SculptConfig(**ACCUMULATE, learned_energy=0.999999))
    stream(sculptor, 3)
    assert sculptor.learned.rooms["0.up"].uses == [2, 2, 2]
    assert sculptor.begin_task().rows[0].trainable_rank == 2


def test_it_goes_on_from_disk_within_a_task_and_between_two(tmp_path: Path) -> None:
    def ended(sculptor: Sculptor, seed: int) -> dict[str, Tensor]:
        learn(sculptor, "x", seed=seed)
        sculptor.end_task()
        return {n: p.detach().clone() for n, p in sculptor.model.named_parameters()}

    sculptor = Sculptor(small_model(), SculptConfig(**ACCUMULATE))
    stream(sculptor, 2)
    sculptor.learned.save(tmp_path / "between")
    between = copy.deepcopy(sculptor.model)
    sculptor.begin_task()
    sculptor.save(tmp_path / "within")
    within = copy.deepcopy(sculptor.model.state_dict())
    expected = ended(sculptor, 5)

    other = Sculptor(between, SculptConfig(**ACCUMULATE))
    other.learned.load(tmp_path / "between", torch.device("cpu"))
    other.begin_task()
    third = small_model()
    third.load_state_dict(within)
    for again in (ended(other, 5), ended(Sculptor.load(third, tmp_path / "within"), 5)):
        assert all(torch.equal(again[name], expected[name]) for name in expected)
    with pytest.raises(FileNotFoundError, match=r"has no learned\.safetensors"):
        other.learned.load(tmp_path, torch.device("cpu"))


def test_another_process_takes_it_up(tmp_path: Path) -> None:
    sculptor = Sculptor(small_model(), SculptConfig(**ACCUMULATE))
    stream(sculptor, 2)
    sculptor.learned.save(tmp_path)
    code = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_accumulate import ACCUMULATE, small_model
from sculpt import SculptConfig, Sculptor
sculptor = Sculptor(small_model(), SculptConfig(**ACCUMULATE))
sculptor.learned.load(Path(sys.argv[1]), torch.device("cpu"))
print([row.trainable_rank for row in sculptor.begin_task().rows])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = [row.trainable_rank for row in sculptor.begin_task().rows]
    assert done.stdout.strip() == str(expected)


def test_what_does_not_go_together_is_refused() -> None:
    for more in ({"engine": "update"}, {"coordinates": "full"}, {"constraint": "core"}):
        with pytest.raises(ValueError, match="protect='accumulate' needs engine='compact'"):
            SculptConfig(**ACCUMULATE, **more)
    for energy in (0.0, 1.0, 1, "most"):
        with pytest.raises(ValueError, match="learned_energy must be a float"):
            SculptConfig(learned_energy=energy)
    sculptor = Sculptor(small_model(), SculptConfig(**ACCUMULATE))
    stream(sculptor, 1)
    with pytest.raises(ValueError, match="take no calibration"):
        sculptor.begin_task([torch.ones(2, 40)])
    other = Sculptor(nn.Sequential(nn.Linear(40, 48)), SculptConfig(**ACCUMULATE))
    other.learned.rooms = sculptor.learned.rooms
    with pytest.raises(ValueError, match="of other layers: '2' is not in both"):
        other.begin_task()
    sculptor.begin_task()
    with pytest.raises(ValueError, match="cannot find what protect='accumulate' has learned"):
        sculptor.verify(independent=True)
