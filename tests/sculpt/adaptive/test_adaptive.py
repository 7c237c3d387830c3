"""Ranks adapt as the paper says, to values worked out by hand, and budgets are met."""

from __future__ import annotations

import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sculpt import AdaptiveRanks, SculptConfig, Sculptor
from sculpt.adaptive.allocate import preserved_rank, scale
from sculpt.adaptive.importance import Importance
from sculpt.task.targets import find_targets


class Parallel(nn.Module):
    """Layers side by side on the same input, as far as they take it."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(W.shape[1], W.shape[0], bias=False) for W in weights)
        for layer, W in zip(self.layers, weights, strict=True):
            layer.weight.data.copy_(W)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return sum(layer(x[..., : layer.in_features]).sum() for layer in self.layers)


def random_model() -> nn.Module:
    torch.manual_seed(0)
    return Parallel([torch.randn(40, 40), torch.randn(64, 40), torch.randn(24, 48), torch.eye(40)])


def data(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 48, generator=generator) for _ in range(count)]


def rows_of(model: nn.Module, ranks: AdaptiveRanks, calibration=None, **config):
    sculptor = Sculptor(model, SculptConfig(ranks=ranks, **config))
    table = sculptor.begin_task(calibration)
    sculptor.end_task()
    return {row.name: row for row in table.rows}


def test_the_papers_formula_by_hand_on_square_and_rectangular_layers() -> None:
    # x = (3, 4, 0, 0, ...) and y = W x cut to min(m, n): cosines by hand.
    k = 10
    swap = torch.eye(k)[[1, 0, *range(2, k)]]  # y = (4, 3, 0, ...): 24 / 25
    tall = torch.zeros(12, k)
    tall[:k] = torch.eye(k)
    tall[10, 0], tall[11, 1] = 7.0, 5.0  # cut away, so y = x: 1
    wide = torch.zeros(k, 12)
    wide[0, 0], wide[2, 1] = 1.0, 1.0  # y = (3, 0, 4, ...): 9 / 25
    wide[3, 11] = 9.0  # reads an entry that is 0
    wide[range(4, k), range(4, k)] = 1.0
    away = -torch.eye(k)  # -1, counted as 0
    x = torch.zeros(2, 12)
    x[:, 0], x[:, 1] = 3.0, 4.0
    model = Parallel([swap, tall, wide, away])
    rows = rows_of(model, AdaptiveRanks(mrr=0.1, trr=0.6), [x])
    mean = (24 / 25 + 1 + 9 / 25 + 0) / 4  # 0.58
    expected = [24 / 25 / mean, 1 / mean, 9 / 25 / mean, 0.0]
    for row, importance in zip(rows.values(), expected, strict=True):
        assert row.importance == pytest.approx(importance, abs=1e-6)
    # r = 0.1 + 0.5 I: 0.9276, 0.9621, 0.4103, 0.1
    assert [row.preserved for row in rows.values()] == [9, 9, 4, 1]


@pytest.mark.parametrize(
    ("importance", "expected"), [(0.0, 10), (1.0, 80), (1.2, 94), (1.29, 99), (5.0, 99)]
)
def test_the_clamp_leaves_a_direction_to_train(importance: float, expected: int) -> None:
    # r = 0.1 + 0.7 I; above 1.2857 it would be more than everything.
    assert preserved_rank(100, importance, AdaptiveRanks()) == expected
    assert preserved_rank(4, 0.0, AdaptiveRanks()) == 1


def test_importance_is_the_mean_over_positions_of_all_batches_without_padding() -> None:
    torch.manual_seed(0)
    W = torch.eye(6) + 0.5 * torch.randn(6, 6)
    model = Parallel([W, torch.eye(6)])
    x, y = torch.randn(2, 3, 6), torch.randn(1, 2, 6)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    seen = torch.cat([x[mask.bool()], y.flatten(0, 1)])
    cosine = nn.functional.cosine_similarity(seen, seen @ W.T, dim=-1).mean()
    assert cosine > 0.1
    batches = [{"x": x, "attention_mask": mask}, y]
    rows = rows_of(model, AdaptiveRanks(), batches)
    ratio = rows["layers.0"].importance / rows["layers.1"].importance
    assert ratio == pytest.approx(float(cosine), abs=1e-6)
    # The mask of an encoder is not that of its decoder: all positions count there.
    model.config = SimpleNamespace(is_encoder_decoder=True)
    assert rows_of(model, AdaptiveRanks(), batches) == rows_of(model, AdaptiveRanks(), [x, y])


def test_fisher_is_the_gradient_in_the_trailing_coordinates() -> None:
    model, batches = random_model(), data()
    rows = rows_of(model, AdaptiveRanks(importance="fisher"), batches)
    expected = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            W = layer.weight.detach().double()
            m, n = W.shape
            h = math.floor(0.8 * min(m, n) + 1e-9)
            U, _, Vt = torch.linalg.svd(W, full_matrices=False)
            squares = []
            for x in batches:
                G = torch.ones(m, 1).double() @ x[:, :n].double().sum(0, keepdim=True)
                squares.append((U[:, h:].T @ G @ Vt[h:].T).square().sum())
            t = min(m, n) - h
            expected[name] = float(torch.stack(squares).mean().sqrt()) * math.sqrt(m * n) / t
    del expected["layers.3"]  # all singular values are equal: any basis would do
    first = expected["layers.0"] / rows["layers.0"].importance
    for name, value in expected.items():
        assert value / rows[name].importance == pytest.approx(first, rel=1e-3)


class WithLoss(nn.Module):
    """Computes a loss where it is given labels, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = random_model().layers

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> SimpleNamespace:
        y = Parallel.forward(self, x)
        return SimpleNamespace(logits=y, loss=None if labels is None else (y - labels).square())


@pytest.mark.parametrize(
    ("model", "batches", "by"),
    [
        (random_model, data(), "cosine"),  # a scalar, which nobody says is a loss
        (WithLoss, [{"x": x} for x in data()], "cosine"),
        (WithLoss, [{"x": x, "labels": torch.tensor(3.0)} for x in data()], "fisher"),
        (random_model, [lambda model, x=x: model(x) for x in data()], "fisher"),
    ],
)
def test_by_itself_it_is_fisher_where_there_is_a_loss_and_the_cosine_elsewhere(
    model, batches, by
) -> None:
    found = rows_of(model(), AdaptiveRanks(), iter(batches))
    assert found == rows_of(model(), AdaptiveRanks(importance=by), iter(batches))
    assert {row.by for row in found.values()} == {by}
    table = Sculptor(model(), SculptConfig(ranks=AdaptiveRanks())).begin_task(batches)
    assert f"importance ({by})" in str(table)


def test_importance_has_mean_one_and_what_was_not_measured_counts_as_the_mean() -> None:
    raw = {"a": Importance(3.0), "b": Importance(1.0), "c": Importance(None, "not reached")}
    scaled = scale(raw)
    assert [scaled["a"].value, scaled["b"].value] == [1.5, 0.5]
    assert scaled["c"].value is None
    assert scaled["c"].note == "not reached: as if of mean importance"
    nothing = scale({"a": Importance(0.0), "b": Importance(0.0)})
    assert all(item.value is None for item in nothing.values())
    assert "no layer has any importance" in nothing["a"].note


@pytest.mark.parametrize("importance", ["cosine", "fisher"])
@pytest.mark.parametrize(
    "budget",
    [
        {"trainable_elements": 4000},
        {"trainable_elements": 0.55},
        {"memory_bytes": 90_000},
        {"protected_energy": 0.7},
    ],
)
@pytest.mark.parametrize("coordinates", ["thin", "full"])
def test_budgets_are_met_to_one_percent(importance, budget, coordinates) -> None:
    model = random_model()
    ranks = AdaptiveRanks(importance=importance, **budget)
    rows = rows_of(model, ranks, data(), coordinates=coordinates)
    config = SculptConfig(coordinates=coordinates)
    (name, wanted), *_ = budget.items()
    spent = 0.0
    total = 0.0
    for target in find_targets(model, config).chosen:
        (m, n), h = target.shape, rows[target.name].preserved
        t = min(m, n) - h
        full = coordinates == "full" and m != n
        elements = t * (max(m, n) if full else t)
        assert rows[target.name].trainable_elements == elements
        squares = torch.linalg.svdvals(target.oriented(target.parameter.detach())).square()
        if name == "trainable_elements":
            spent += elements
            total += m * n if isinstance(wanted, float) else 0
        elif name == "memory_bytes":
            bases = min(m, n) * t + max(m, n) * h if full else (m + n) * t
            spent += 4 * (5 * elements + bases)
        else:
            spent += float(squares[:h].sum())
            total += float(squares.sum())
    wanted_in_all = wanted * total if total else wanted
    assert spent == pytest.approx(wanted_in_all, rel=0.01)


def test_layers_of_one_importance_still_meet_a_budget() -> None:
    torch.manual_seed(0)
    model = Parallel([torch.randn(16, 16).repeat(2, 1) for _ in range(30)])
    for layer in model.layers:
        layer.weight.data.copy_(model.layers[0].weight)
    rows = rows_of(model, AdaptiveRanks(trainable_elements=900), [torch.zeros(2, 16)])
    assert sum(r.trainable_elements for r in rows.values()) == pytest.approx(900, rel=0.01)
    assert len({row.preserved for row in rows.values()}) == 2  # 30 t² would jump from 750 to 1080


def test_a_budget_that_cannot_be_met_is_an_error_with_what_can() -> None:
    model = random_model()
    before = [p.detach().clone() for p in model.parameters()]
    for budget in ({"trainable_elements": 10**6}, {"protected_energy": 0.01}):
        ranks = AdaptiveRanks(**budget)
        sculptor = Sculptor(model, SculptConfig(ranks=ranks))
        with pytest.raises(
            ValueError, match=r"cannot be met to 1%: the nearest is .* it goes from"
        ):
            sculptor.begin_task(data())
    config = SculptConfig(ranks=AdaptiveRanks(memory_bytes=1000), engine="update")
    with pytest.raises(ValueError, match=r"ranks\.memory_bytes needs engine='compact'"):
        Sculptor(model, config).begin_task(data())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(20, 20), nn.Linear(20, 20)
        self.embed = nn.Embedding(20, 20)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.used(self.embed(ids)).square().mean()


@pytest.mark.parametrize("importance", ["cosine", "fisher"])
def test_a_layer_that_is_never_reached_is_named_and_gets_the_uniform_rank(importance) -> None:
    config = {"target_modules": ["used", "unused", "embed"]}
    ids = [torch.arange(5)]
    rows = rows_of(Gated(), AdaptiveRanks(importance=importance), ids, **config)
    assert rows["unused"].preserved == 16
    assert rows["unused"].importance is None
    assert rows["unused"].note.startswith("never reached by the calibration data")
    if importance == "cosine":
        assert "not those of a linear layer" in rows["embed"].note
    sculptor = Sculptor(Gated(), SculptConfig(ranks=AdaptiveRanks(importance=importance), **config))
    assert "never reached" in str(sculptor.begin_task(ids))


def test_rank_pattern_keeps_what_it_says() -> None:
    rows = rows_of(
        random_model(), AdaptiveRanks(), data(), rank_pattern={"layers.0": 7, "layers.1": 0.5}
    )
    assert [rows[f"layers.{i}"].preserved for i in (0, 1)] == [7, 20]
    assert rows["layers.0"].note == "rank_pattern"


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (None, ValueError, r"need data of the task before.*begin_task\(calibration=batches\)"),
        ([], ValueError, "calibration is empty"),
        (iter([]), ValueError, "calibration is empty"),
        (torch.ones(2, 48), TypeError, "iterable of batches .* got Tensor"),
        ({"x": 1}, TypeError, "iterable of batches .* got dict"),
        ([3], TypeError, r"calibration\[0\] must be a mapping, .* got int"),
        ([torch.ones(2, 48), torch.full((2, 48), math.nan)], ValueError, r"\[1\] has values that"),
        ([{"x": torch.ones(0, 48)}], ValueError, r"calibration\[0\]\['x'\] is empty"),
        ([(torch.ones(2, 48, device="meta"),)], ValueError, r"\[0\]\[0\] is on meta, the model on"),
        ([torch.full((2, 48), 3e38)], ValueError, "not finite at 'layers.0'"),
    ],
)
def test_bad_calibration_is_named_and_nothing_is_changed(calibration, error, message) -> None:
    model = random_model()
    flags = [p.requires_grad for p in model.parameters()]
    sculptor = Sculptor(model, SculptConfig(ranks=AdaptiveRanks()))
    with pytest.raises(error, match=message):
        sculptor.begin_task(calibration)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(not module._forward_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="no task is running"):
        sculptor.verify()


def test_fisher_needs_a_loss() -> None:
    ranks = AdaptiveRanks(importance="fisher")
    sculptor = Sculptor(random_model(), SculptConfig(ranks=ranks))
    with pytest.raises(ValueError, match="must give a loss"):
        sculptor.begin_task([lambda model: torch.ones(3)])
    with pytest.raises(ValueError, match="loss that is not finite, nan"):
        sculptor.begin_task([lambda model: model(torch.ones(1, 48)) * math.nan])


@pytest.mark.parametrize("importance", ["cosine", "fisher"])
def test_no_activation_and_no_gradient_is_kept_and_the_model_is_as_it_was(importance) -> None:
    model = random_model().train()
    model.forward = lambda x: sum(m(x[..., : m.in_features]).square().sum() for m in model.layers)
    model.layers[0].weight.requires_grad_(False)
    model.layers[1].weight.grad = torch.ones_like(model.layers[1].weight)
    alive: list[weakref.ref] = []

    def count(batch: int):
        def run(model: nn.Module) -> torch.Tensor:
            # Whatever the layers put out for the batches before is gone by now.
            assert [ref for ref in alive if ref() is not None] == []
            assert all(p.grad is None for p in model.parameters()) or importance == "cosine"
            return model(data()[batch])

        return run

    def note(_: nn.Module, args: object, output: torch.Tensor) -> None:
        # By the cosine not even those of the layer before are left.
        assert importance == "fisher" or not any(ref() is not None for ref in alive)
        alive.append(weakref.ref(output))

    for layer in model.layers:
        layer.register_forward_hook(note)
    own = [dict(layer._forward_hooks) for layer in model.layers]
    Sculptor(model, SculptConfig(ranks=AdaptiveRanks(importance=importance))).begin_task(
        [count(batch) for batch in range(3)]
    )
    assert len(alive) == 3 * 4
    assert [dict(layer._forward_hooks) for layer in model.layers] == own
    assert model.training
    assert bool((model.layers[1].weight.grad == 1).all())


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"mrr": 1}, TypeError, r"ranks\.mrr must be a float; got 1 \(int\)"),
        ({"trr": 1.0}, ValueError, "0 <= mrr <= trr < 1"),
        ({"mrr": 0.9}, ValueError, "got mrr=0.9, trr=0.8"),
        ({"importance": "magic"}, ValueError, r"ranks\.importance must be one of 'auto', 'cosine'"),
        ({"trainable_elements": 5, "memory_bytes": 5}, ValueError, "exclude each other"),
        ({"trainable_elements": 1.5}, ValueError, r"in \(0, 1\); got 1.5"),
        ({"trainable_elements": True}, TypeError, "got True"),
        ({"memory_bytes": 0}, ValueError, "at least 1; got 0"),
        ({"memory_bytes": 0.5}, TypeError, r"must be an int; got 0.5"),
        ({"protected_energy": 1}, TypeError, r"float in \(0, 1\); got 1"),
    ],
)
def test_bad_values_are_named(kwargs, error, message) -> None:
    with pytest.raises(error, match=message):
        AdaptiveRanks(**kwargs)


def test_the_configuration_takes_a_mapping_and_one_choice_of_rank() -> None:
    config = SculptConfig(ranks={"mrr": 0.2, "trr": 0.7})
    assert config.ranks == AdaptiveRanks(mrr=0.2, trr=0.7)
    assert config.unfreeze_rank_ratio is None
    with pytest.raises(ValueError, match="effective_rank and ranks exclude each other"):
        SculptConfig(ranks=AdaptiveRanks(), effective_rank=3)
    with pytest.raises(TypeError, match=r"ranks has no field 'mr'.*mrr, trr"):
        SculptConfig(ranks={"mr": 0.2})
    with pytest.raises(TypeError, match="must be an AdaptiveRanks or a mapping"):
        SculptConfig(ranks="adaptive")


def test_chosen_ranks_are_in_the_saved_state(tmp_path) -> None:
    model = random_model()
    sculptor = Sculptor(model, SculptConfig(ranks=AdaptiveRanks()))
    chosen = {row.name: row.preserved for row in sculptor.begin_task(data(), "first").rows}
    assert len(set(chosen.values())) > 2
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    sculptor.save(tmp_path)
    other = random_model()
    other.load_state_dict(weights)
    loaded = Sculptor.load(other, tmp_path)
    assert loaded.config == sculptor.config
    shapes = {name: C.shape for name, C in sculptor.named_parameters()}
    assert {name: C.shape for name, C in loaded.named_parameters()} == shapes
