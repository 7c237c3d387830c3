"""The life cycle with something protected: what moves on earlier rows, and what is refused."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from sculpt import AdaptiveRanks, SculptConfig, Sculptor
from sculpt.curvature.collect import bytes_of_all
from sculpt.task.targets import find_targets
from tests.sculpt.curvature.oracle import Rows
from tests.sculpt.curvature.test_sums import assert_same
from tests.sculpt.small_models import KINDS

WIDTH = 24


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 6)
    )
    return layers.to(dtype)


def rows(task: int, count: int = 160) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of a task lie in six directions of its own, and a little beside them."""
    g = torch.Generator().manual_seed(task)
    basis = torch.linalg.qr(torch.randn(WIDTH, 6, generator=g)).Q
    x = torch.randn(count, 6, generator=g) @ basis.mT + 0.01 * torch.randn(
        count, WIDTH, generator=g
    )
    return x, torch.randint(0, 6, (count,), generator=g)


def loss_of(x: torch.Tensor, y: torch.Tensor, model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x.to(model[0].weight.dtype)), y, reduction="sum")


def batches(task: int) -> list:
    return [partial(loss_of, x, y) for x, y in zip(*(t.split(40) for t in rows(task)), strict=True)]


def train(model: nn.Module, sculptor: Sculptor, task: int, steps: int = 40) -> float:
    optimizer = torch.optim.AdamW(sculptor.parameters(), lr=3e-3)
    sculptor.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(*rows(task), model) / 160
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def second_task(config: SculptConfig, calibration: bool = True):
    """A task after a protected one: model, outputs on earlier rows before it, sculptor."""
    model = network()
    sculptor = Sculptor(model, config)
    sculptor.begin_task(name="one")
    train(model, sculptor, 1)
    sculptor.end_task(batches(1))
    with torch.no_grad():
        before = model(rows(1)[0])
    curved = config.subspaces != "weights"
    table = sculptor.begin_task(batches(2) if curved and calibration else None, "two")
    return model, before, sculptor, table


def inputs_of(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    with torch.no_grad():
        for name, layer in model.named_children():
            if isinstance(layer, nn.Linear):
                found[name] = x.double()
            x = layer(x)
    return found


@pytest.mark.parametrize("calibration", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"engine": "update"}, {"coordinates": "full"}, {"constraint": "core"}],
    ids=lambda options: ", ".join(options.values()) or "compact",
)
def test_outputs_on_earlier_rows_move_as_the_certificate_says(options, calibration):
    config = SculptConfig(**options)
    model, before, sculptor, table = second_task(config, calibration)
    weights = {name: layer.weight.detach().double() for name, layer in model.named_children()
               if isinstance(layer, nn.Linear)}  # fmt: skip
    weights = {name: weight.clone() for name, weight in weights.items()}
    inputs = inputs_of(model, rows(1)[0])
    method = "ratio" if calibration else "trailing"
    method = method if sculptor.config.chosen_engine == "compact" else "leading preserved"
    assert {row.method for row in table.rows} == {f"curvature, {method}"}
    start = float(loss_of(*rows(2), model).detach()) / 160
    loss = train(model, sculptor, 2)
    certificate = sculptor.verify()
    assert certificate.ok
    for row in certificate.rows:
        W = weights[row.name]
        after = model.get_submodule(row.name).weight.detach().double()
        x = inputs[row.name]
        moved = float((x @ (after - W).mT).square().sum() / (x @ W.mT).square().sum())
        # Float32 sums of 160 outer products, and ΔW of float32 weights.
        assert row.outputs == pytest.approx(moved, rel=1e-3, abs=1e-9)
    worst = max(certificate.rows, key=lambda row: row.outputs)
    assert f"moved by {worst.outputs:.1e} of their squares at most ({worst.name})" in str(
        certificate
    )
    sculptor.end_task()
    assert loss < start - 0.003
    with torch.no_grad():
        changed = float((model(rows(1)[0]) - before).norm() / before.norm())
    assert changed > 0


def test_earlier_rows_hardly_notice_a_task_that_curvature_confines():
    """With subspaces of the weights they do, at the same rank and rate."""
    moved, lost, outputs = {}, {}, {}
    for subspaces in ("weights", "auto", "curvature"):
        if subspaces == "curvature":
            model = network()
            sculptor = Sculptor(model, SculptConfig())
            sculptor.begin_task()
            train(model, sculptor, 1)
            sculptor.end_task(batches(1))
            again = Sculptor(model, SculptConfig(subspaces="curvature"))
            again.memory, sculptor = sculptor.memory, again
            with torch.no_grad():
                before = model(rows(1)[0])
            sculptor.begin_task(batches(2))
        else:
            model, before, sculptor, _ = second_task(SculptConfig(subspaces=subspaces))
        was = float(loss_of(*rows(1), model).detach()) / 160
        train(model, sculptor, 2)
        outputs[subspaces] = max(row.outputs for row in sculptor.verify().rows)
        sculptor.end_task()
        with torch.no_grad():
            moved[subspaces] = float((model(rows(1)[0]) - before).norm() / before.norm())
        lost[subspaces] = float(loss_of(*rows(1), model).detach()) / 160 - was
    for subspaces in ("auto", "curvature"):
        assert moved[subspaces] < 0.2 * moved["weights"], moved
        assert lost[subspaces] < 0.2 * lost["weights"], lost
        assert outputs[subspaces] < 0.05 * outputs["weights"], outputs
    assert moved["auto"] == moved["curvature"]


def test_rows_add_up_over_tasks_and_calls():
    model, _, sculptor, _ = second_task(SculptConfig())
    train(model, sculptor, 2, steps=2)
    sculptor.end_task(iter(batches(2)))
    sculptor.protect(batches(3)[:1])
    assert sculptor.memory.rows == {"one": 4, "two": 4, "": 1}
    assert int(sculptor.memory.of("0")[1].count) == 160 + 160 + 40


def test_embeddings_and_experts_train_in_directions_of_curvature():
    for name in ("embedding and head, not tied", "tied head and embedding", "mixtral experts"):
        kind = KINDS[name]
        model = kind.build()
        sculptor = Sculptor(model, SculptConfig(target_modules=kind.targets))
        sculptor.protect([Rows().batch()])
        table = sculptor.begin_task([Rows((6, 6)).batch()])
        assert {row.method for row in table.rows} == {"curvature, ratio"}
        optimizer = torch.optim.AdamW(sculptor.parameters(), lr=1e-2)
        sculptor.attach(optimizer)
        kind.loss(model).backward()
        optimizer.step()
        certificate = sculptor.verify()
        assert certificate.ok, name
        known = [row.outputs < float("inf") for row in certificate.rows]
        assert all(known) == (name != "tied head and embedding")


def test_a_running_task_goes_on_with_the_same_bits(tmp_path):
    model, _, sculptor, _ = second_task(SculptConfig())
    optimizer = torch.optim.AdamW(sculptor.parameters(), lr=3e-3)
    sculptor.attach(optimizer)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(*rows(2), model).backward()
            optimizer.step()

    steps(model, optimizer, 3)
    sculptor.save(tmp_path)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    fresh = network()
    fresh.load_state_dict(weights)
    other = Sculptor.load(fresh, tmp_path)
    assert_same(other.memory, sculptor.memory)
    again = torch.optim.AdamW(other.parameters(), lr=3e-3)
    again.load_state_dict(state)
    other.attach(again)
    for m, s, o in ((model, sculptor, optimizer), (fresh, other, again)):
        steps(m, o, 3)
        s.end_task(batches(2))
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, fresh.state_dict()[key])
    assert_same(other.memory, sculptor.memory)
    tables = [s.begin_task(batches(3)) for s in (sculptor, other)]
    bases = [[m.bases for m in s._task.matrices.values()] for s in (sculptor, other)]
    for one, two in zip(*bases, strict=True):
        assert torch.equal(one.U, two.U)
        assert torch.equal(one.V, two.V)
        assert one.gain == two.gain
    assert tables[0].rows == tables[1].rows


class Partly(nn.Module):
    """Has a layer that no row reaches, and one whose output nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.unread = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        self.unread(x)
        return self.used(x)


def test_a_layer_that_no_row_reaches_is_named_and_keeps_its_weights():
    torch.manual_seed(0)
    model = Partly()
    sculptor = Sculptor(model, SculptConfig())
    x = rows(1)[0]
    with pytest.warns(UserWarning, match="no row .* reached idle, unread: their subspaces stay"):
        sculptor.protect([lambda model: model(x).square().sum()])
    table = sculptor.begin_task()
    methods = {row.name: row.method for row in table.rows}
    assert methods["used"] == "curvature, trailing"
    assert "curvature" not in methods["idle"] + methods["unread"]


def test_fewer_rows_than_directions_are_said(recwarn):
    sculptor = Sculptor(network(), SculptConfig())
    x, y = rows(1)
    sculptor.protect([partial(loss_of, x[:WIDTH], y[:WIDTH])])
    [warning] = [w for w in recwarn if "fewer tokens than directions" in str(w.message)]
    assert "are protected at 2, 4: directions" in str(warning.message)  # 32 wide, the first 24
    sculptor.protect([partial(loss_of, x[:8], y[:8])])
    assert len([w for w in recwarn if "fewer tokens than directions" in str(w.message)]) == 1


NAN = [lambda model: model(rows(1)[0]).sum() * torch.nan]
HUGE = [lambda model: model(1e30 * rows(1)[0]).sum() * 1e-30]
X = rows(1)[0]
BAD = {
    "nothing": ([], ValueError, "batches is empty; expected at least one batch"),
    "a tensor": (X, TypeError, "batches must be an iterable of batches .* got Tensor"),
    "tensors": ([X], ValueError, "batches with labels for a model that computes one"),
    "no labels": ([{"input": X}], ValueError, "batches with labels for a model that computes one"),
    "no rows": ([{"input": X[:0]}], ValueError, r"batches\[0\]\['input'\] is empty, \(0, 24\)"),
    "text": (["rows"], TypeError, r"batches\[0\] must be a mapping, a tensor, a tuple or a func"),
    "rows not finite": ([{"input": X / 0}], ValueError, r"batches\[0\]\['input'\] has values"),
    "no loss": ([lambda model: model(X)], ValueError, "functions of the model that return the sum"),
    "loss not finite": (NAN, ValueError, "a batch gives a loss that is not finite, nan"),
    "sums not finite": (HUGE, ValueError, "values at '0' are not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_batches_that_cannot_be_protected(name):
    given, error, match = BAD[name]
    model = network()
    sculptor = Sculptor(model, SculptConfig())
    sculptor.protect(batches(1))
    before = copy.deepcopy(sculptor.memory)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error, match=match):
        sculptor.protect(given)
    assert_same(sculptor.memory, before)
    assert all(flags)
    assert all(parameter.requires_grad for parameter in model.parameters())
    # Calibration of the next task is looked at in the same way.
    with pytest.raises(error):
        sculptor.begin_task(given)
    sculptor.begin_task()
    train(model, sculptor, 1, steps=1)
    with pytest.raises(error, match=match):
        sculptor.end_task(given)
    if ("not finite" in name and name != "rows not finite") or name == "no loss":
        sculptor.protect(batches(1))  # The task has ended.
    else:
        sculptor.end_task(batches(1))
    assert sculptor.memory.rows == {"": 8}


def test_labels_that_learn_nothing():
    model = KINDS["linear"].build()
    batch = Rows().batch()
    with pytest.raises(ValueError, match="a batch gives a loss that is not finite, nan"):
        Sculptor(model, SculptConfig()).protect([batch | {"labels": batch["labels"] * 0 - 100}])


def test_memory_of_another_model_is_refused_when_it_is_used():
    model = network()
    sculptor = Sculptor(model, SculptConfig())
    sculptor.protect(batches(1))
    smaller = nn.Sequential(*list(copy.deepcopy(model))[:3])
    other = Sculptor(smaller, SculptConfig())
    other.memory = sculptor.memory
    for call in (other.begin_task, partial(other.protect, batches(1))):
        with pytest.raises(ValueError, match="of another model or of other targets: it has 4"):
            call()
    smaller.append(nn.Tanh()).append(nn.Linear(32, 7))
    with pytest.raises(ValueError, match="does not fit '4', which is 7 x 32: a factor has the"):
        other.begin_task()


def test_calls_at_the_wrong_time(tmp_path):
    model = network()
    sculptor = Sculptor(model, SculptConfig(subspaces="curvature"))
    with pytest.raises(ValueError, match="subspaces='curvature' needs something to protect"):
        sculptor.begin_task(batches(1))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of inference_mode"):
        sculptor.protect(batches(1))
    with torch.no_grad():
        sculptor.protect(batches(1))
    sculptor.save_memory(tmp_path)
    sculptor.begin_task(batches(1))
    for call in (
        partial(sculptor.protect, batches(1)),
        partial(sculptor.load_memory, tmp_path),
        partial(sculptor.protect_generated, None),
    ):
        with pytest.raises(RuntimeError, match="a task is running"):
            call()
    with pytest.raises(ValueError, match="independent=True decomposes the weights before the task"):
        sculptor.verify(independent=True)
    assert sculptor.memory.rows == {"": 4}


def test_subspaces_of_the_weights_take_no_calibration():
    model = network()
    sculptor = Sculptor(model, SculptConfig(subspaces="weights"))
    sculptor.protect(batches(1))
    with pytest.raises(ValueError, match="calibration is not used by uniform ranks"):
        sculptor.begin_task(batches(2))
    table = sculptor.begin_task()
    assert not any("curvature" in row.method for row in table.rows)
    # What is protected is measured all the same.
    train(model, sculptor, 2, steps=1)
    assert all(0 < row.outputs < 1 for row in sculptor.verify().rows)


def test_nothing_to_compare_with_yet():
    """The first task is given its rows as later ones are, and needs none."""
    sculptor = Sculptor(network(), SculptConfig())
    table = sculptor.begin_task(batches(1))
    assert not any("curvature" in row.method for row in table.rows)


COSINE = AdaptiveRanks(mrr=0.2, trr=0.6, importance="cosine")


def test_engines_that_compare_nothing_collect_nothing():
    sculptor = Sculptor(network(), SculptConfig(engine="update"))
    sculptor.protect(batches(1))

    def unwanted(model: nn.Module) -> torch.Tensor:
        raise AssertionError("a batch was passed")

    rows = sculptor.begin_task([unwanted]).rows
    assert {row.method for row in rows} == {"curvature, leading preserved"}


def test_ranks_adapt_with_directions_of_curvature():
    sculptor = Sculptor(network(), SculptConfig(ranks=COSINE))
    sculptor.protect(batches(1))
    x = [partial(loss_of, *rows(2))]
    table = sculptor.begin_task(x)
    assert {row.method for row in table.rows} == {"curvature, ratio"}


def test_factors_that_do_not_fit_are_sketches_and_then_refused():
    """Ten factors: of 24, 32, 32, 32, 32 and 6 numbers, the longest sketched first."""
    model = network()
    whole = 4 * (24**2 + 4 * 32**2 + 6**2)
    targets = find_targets(model, SculptConfig()).chosen

    def kinds(limit: int, rank: int = 8) -> dict[str, str]:
        config = SculptConfig(factor_bytes=limit, sketch_rank=rank)
        sculptor = Sculptor(model, config)
        sculptor.protect(batches(1))
        factors = sculptor.memory.factors
        used = sum(f.total.numel() * f.total.element_size() for f in factors.values())
        assert used == bytes_of_all(targets, config, torch.device("cpu")) <= limit
        return {key: factor.kind for key, factor in factors.items()}

    assert set(kinds(whole).values()) == {"full"}
    some = kinds(whole - 1)
    assert [key for key, kind in some.items() if kind == "sketch"] == ["0.left"]
    least = 4 * (8 * (24 + 4 * 32) + 6**2)
    assert sum(kind == "sketch" for kind in kinds(least).values()) == 5
    sculptor = Sculptor(model, SculptConfig(factor_bytes=least - 1, sketch_rank=8))
    with pytest.raises(ValueError, match=rf"factor_bytes={least - 1}: .* take {least:,} bytes as"):
        sculptor.protect(batches(1))
    assert not sculptor.memory
    # It trains in sketches, too.
    sculptor = Sculptor(model, SculptConfig(factor_bytes=least, sketch_rank=8))
    sculptor.protect(batches(1))
    sculptor.begin_task(batches(2))
    train(model, sculptor, 2, steps=2)
    assert sculptor.verify().ok
