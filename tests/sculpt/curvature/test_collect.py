"""Statistics of every kind of layer against a loop over single rows."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM, MambaConfig, MambaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from sculpt import SculptConfig
from sculpt.task.targets import find_targets
from tests.sculpt.curvature.oracle import Rows, assert_sums, by_hand, collected, in_float64
from tests.sculpt.small_models import KINDS

CASES = {
    "linear": Rows(),
    "conv1d, fused qkv": Rows(),
    "embedding and head, not tied": Rows(),
    # Both are padded to the same length, each in its own rows.
    "t5": Rows((7, 4, 6), answers=(3, 7, 5)),
    "bart": Rows((7, 4, 6), answers=(3, 7, 5)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cut", [(0,), (1, 2)], ids=["one batch", "two batches"])
def test_sums_of_every_layer(name, cut):
    kind, rows = KINDS[name], CASES[name]
    model = in_float64(kind.build(torch.float64))
    parts = [range(0, 1), range(1, 3)] if len(cut) == 2 else [range(3)]
    memory = collected(model, [rows.batch(*part) for part in parts], target_modules=kind.targets)
    names = [t.name for t in find_targets(model, SculptConfig(target_modules=kind.targets)).chosen]
    assert len(names) == kind.count
    expected = by_hand(model, names, [partial(rows.loss, model, i) for i in range(3)])
    assert memory.rows == {"rows": 3}
    for layer, (X, G) in expected.items():
        reads, writes = (X, G) if memory.sides[layer].reads == "right" else (G, X)
        left, right = memory.of(layer)
        assert_sums(right, reads)
        assert_sums(left, writes)
        assert G.abs().max() > 0


def test_layers_that_read_one_tensor_share_its_factor():
    model = KINDS["linear"].build()
    memory = collected(model, [Rows().batch()])
    block = "model.layers.0"
    of = {name.removeprefix(f"{block}."): memory.sides[name].right for name in memory.sides}
    assert of["self_attn.q_proj"] == of["self_attn.k_proj"] == of["self_attn.v_proj"]
    assert of["mlp.gate_proj"] == of["mlp.up_proj"]
    # A block: four of inputs, seven of gradients.
    assert len([key for key in memory.factors if key.startswith(block)]) == 11


def test_a_tied_weight_has_both_uses_in_each_factor():
    kind, rows = KINDS["tied head and embedding"], Rows()
    model = in_float64(kind.build(torch.float64))
    memory = collected(model, [rows.batch()], target_modules=kind.targets)
    names = ["model.embed_tokens", "lm_head"]
    found = by_hand(model, names, [partial(rows.loss, model, i) for i in range(3)])
    (ids, of_rows), (x, of_logits) = found[names[0]], found[names[1]]
    ((name, sides),) = memory.sides.items()
    left, right = memory.of(name)
    assert_sums(left, torch.cat([ids, of_logits]))
    assert_sums(right, torch.cat([x, of_rows]))
    # What its outputs do cannot be told any more.
    assert sides.reads == "both"
    assert memory.outputs(name, torch.eye(40, 16)) is None


def test_nobody_shares_the_inputs_of_a_tied_weight():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.other = nn.Embedding(9, 6), nn.Linear(6, 9)
            self.head = nn.Linear(6, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            h = self.table(ids)
            return (self.head(h) * self.other(h)).square().sum()

    torch.manual_seed(0)
    model, ids = Tied(), torch.tensor([[1, 3, 3], [8, 0, 1]])
    memory = collected(model, [lambda model: model(ids)], target_modules=["table", "other"])
    assert_sums(memory.of("other")[1], model.table(ids).detach().flatten(0, 1))


def test_experts_one_by_one():
    """Against the forward pass of a mixture, token by token; padding goes to experts as well."""
    rows = Rows()
    model = in_float64(KINDS["mixtral experts"].build(torch.float64))
    memory = collected(model, [rows.batch()])
    mlp = model.model.layers[0].mlp
    experts = mlp.experts
    met = [[[], [], [], []] for _ in range(3)]

    def forward(hidden, index, weights):
        out = []
        for h, chosen, shares in zip(hidden, index, weights, strict=True):
            total = 0
            for e, share in zip(chosen.tolist(), shares, strict=True):
                first = experts.gate_up_proj[e] @ h
                gate, up = first.chunk(2)
                middle = experts.act_fn(gate) * up
                second = experts.down_proj[e] @ middle
                for tensor in (first, second):
                    tensor.retain_grad()
                for column, tensor in zip(met[e], (h, first, middle, second), strict=True):
                    column.append(tensor)
                total = total + share * second
            out.append(total)
        return torch.stack(out)

    experts.forward = forward
    for row in range(3):
        rows.loss(model, row).backward()
    for e, (h, first, middle, second) in enumerate(met):
        assert len(h) > 0
        for name, x, y in (("gate_up_proj", h, first), ("down_proj", middle, second)):
            left, right = memory.of(f"model.layers.0.mlp.experts.{name}")
            assert_sums(right, torch.stack(x).detach(), e)
            assert_sums(left, torch.stack([t.grad for t in y]), e)


@pytest.mark.parametrize("name", ["qwen experts", "gpt-oss experts"])
def test_other_experts_are_seen_as_well(name):
    kind = KINDS[name]
    memory = collected(kind.build(), [Rows().batch()])
    assert len(memory.sides) == kind.count
    sums = [factor.total for factor in memory.factors.values() if factor.count.ndim]
    assert len(sums) == 4
    for total in sums:
        assert (total.diagonal(dim1=-2, dim2=-1).sum(-1) > 0).sum() >= 2


class Beside(nn.Module):
    """Uses each weight past its layer, in all the ways that a product can be written."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x):
        h = F.linear(x, weight=self.a.weight) + (self.b.weight @ x.mT).mT
        return h.tanh() @ self.c.weight


def test_weights_that_are_read_past_their_layers():
    torch.manual_seed(0)
    model = Beside().double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    memory = collected(model, [lambda model: model(x).square().sum()])
    h = ((x @ model.a.weight.mT) + (x @ model.b.weight.mT)).detach()
    dh = (2 * h.tanh() @ model.c.weight @ model.c.weight.mT * (1 - h.tanh() ** 2)).detach()
    for name in "ab":
        left, right = memory.of(name)
        assert_sums(right, x.flatten(0, 1))
        assert_sums(left, dh.flatten(0, 1))
    assert memory.sides["b"].right == "b.right"  # A view is not the same tensor.
    # `y = x W` reads on the other side.
    assert memory.sides["c"].reads == "left"
    left, right = memory.of("c")
    assert_sums(left, h.tanh().flatten(0, 1))
    assert_sums(right, (2 * h.tanh() @ model.c.weight).detach().flatten(0, 1))


def test_the_transformer_of_torch():
    """Its attention multiplies by itself, and in an evaluation all of it is one function."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).double()
    model = nn.Sequential(layer, nn.Linear(8, 2, dtype=torch.float64))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    memory = collected(model, [lambda model: model(x).square().sum()])
    assert torch.backends.mha.get_fastpath_enabled()
    model.eval()
    names = ["0.linear1", "0.linear2", "1"]
    found = by_hand(model, names, [lambda: model(x).square().sum()])
    attention = copy.deepcopy(layer.self_attn)
    with torch.no_grad():
        attention.out_proj.weight.copy_(torch.eye(8))
        attention.out_proj.bias.zero_()
    said = []
    layer.self_attn.register_forward_hook(
        lambda *a: (a[2][0].retain_grad(), said.append(a[2][0]))[0]
    )
    model(x).square().sum().backward()
    found["0.self_attn.out_proj"] = (
        attention(x, x, x)[0].detach().flatten(0, 1),
        said[0].grad.flatten(0, 1),
    )
    assert set(found) == set(memory.sides)
    for name, (read, g) in found.items():
        left, right = memory.of(name)
        assert_sums(right, read)
        assert_sums(left, g)


def test_a_state_space_layer_that_multiplies_from_the_left():
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=6
    )
    model, rows = in_float64(MambaForCausalLM(config).double().eval()), Rows((5, 5))
    mixer = "backbone.layers.0.mixer"
    memory = collected(model, [rows.batch()], target_modules=["dt_proj", "x_proj"])
    found = by_hand(model, [f"{mixer}.x_proj"], [partial(rows.loss, model, i) for i in range(2)])
    x, g = found[f"{mixer}.x_proj"]
    left, right = memory.of(f"{mixer}.x_proj")
    assert_sums(right, x)
    assert_sums(left, g)
    # The first six outputs of `x_proj` are what `dt_proj` reads.
    _, right = memory.of(f"{mixer}.dt_proj")
    assert_sums(right, (x @ model.get_submodule(f"{mixer}.x_proj").weight.mT).detach()[:, :6])


def same_bits(one, other):
    assert one.sides == other.sides
    assert one.factors.keys() == other.factors.keys()
    for key, factor in one.factors.items():
        for name, tensor in factor.tensors().items():
            assert torch.equal(tensor, other.factors[key].tensors()[name]), (key, name)


def stacked(reentrant: bool | None, width: int = 6) -> nn.Module:
    """Blocks that may recompute what they did in the forward pass."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Embedding(9, width), nn.Linear(width, 2)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True)) for _ in range(2)
            )

        def forward(self, ids):
            h = self.first(ids)
            for block in self.blocks:
                if reentrant is None:
                    h = block(h)
                else:
                    h = checkpoint(block, h, use_reentrant=reentrant)
            return self.head(h)

    torch.manual_seed(0)
    return Blocks()


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_recompute_are_counted_once(reentrant):
    ids = torch.arange(6).view(2, 3)
    found = [
        collected(stacked(r), [lambda model: model(ids).square().sum()]) for r in (None, reentrant)
    ]
    assert len(found[0].factors) == 6
    same_bits(*found)


@pytest.mark.parametrize("name", ["linear", "t5"])
def test_gradient_checkpointing_of_transformers(name):
    """It recomputes, without dropout, and gives the same bits."""
    rows = CASES[name]
    plain = collected(KINDS[name].build(), [rows.batch()])
    model = KINDS[name].build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    model.gradient_checkpointing_enable()
    seen = []
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            function = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = lambda *a, f=function: seen.append(1) or f(*a)
    same_bits(plain, collected(model, [rows.batch()]))
    assert seen
    assert all(module.training for module in model.modules())


def test_dropout_that_a_layer_calls_itself_is_left_out():
    class Drops(GradientCheckpointingLayer):
        gradient_checkpointing = True

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)
            self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

        def forward(self, x):
            return self.a(F.dropout(x, 0.5, training=self.training))

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    memory = collected(Drops(), [lambda model: model(x).sum()])
    assert_sums(memory.of("a")[1], x)


@pytest.mark.parametrize(("rank", "limit"), [(512, 1024), (4, 512)])
def test_under_autocast_sums_are_float32(rank, limit):
    """The inputs are what the layer was given, and not rounded again on the way into the sums."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    x = torch.randn(50, 8)
    with torch.autocast("cpu", torch.bfloat16):
        h = model[1](model[0](x)).detach()
        memory = collected(
            model,
            [lambda model: model(x).float().sum()],
            sketch_rank=rank,
            factor_bytes=1200 if rank == 512 else 600,
        )
        assert torch.is_autocast_enabled("cpu")
    for name, read in (("0", x), ("2", h)):
        factor = memory.of(name)[1]
        assert factor.total.dtype == torch.float32
        if rank == 512:
            assert factor.kind == "full"
            assert_sums(factor, read)
        else:
            assert factor.kind == "sketch"
            read = read.double()
            Omega = factor.test_matrix().double()
            sizes = read.abs().mT @ (read.abs() @ Omega.abs())
            error = (factor.total - read.mT @ (read @ Omega)).abs()
            assert (error <= (50 + 8 + 5) * 2.0**-24 * sizes).all()


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    kind = KINDS["mixtral experts"]
    model = kind.build()
    model.set_experts_implementation("grouped_mm")
    model.train()
    model.model.layers[0].self_attn.eval()
    model.model.norm.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)

    def state():
        return {
            "training": [module.training for module in model.modules()],
            "flags": [parameter.requires_grad for parameter in model.parameters()],
            "grads": [parameter.grad for parameter in model.parameters()],
            "hooks": [
                [len(hooks) for key, hooks in vars(m).items() if key.endswith("_hooks")]
                for m in model.modules()
            ],
            "config": model.config.to_dict() | {"experts": model.config._experts_implementation},
            "attributes": [sorted(vars(module)) for module in model.modules()],
            "grad": torch.is_grad_enabled(),
        }

    before, weights = state(), copy.deepcopy(model.state_dict())
    grad = model.lm_head.weight.grad
    batches = [Rows().batch()] + ([Rows().batch() | {"labels": torch.full((3, 7), -100)}] * fails)
    with torch.no_grad():
        if fails:
            with pytest.raises(ValueError, match="not finite, nan"):
                collected(model, batches)
        else:
            collected(model, batches)
    assert state() == before
    assert model.lm_head.weight.grad is grad
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])


def test_rows_count_alike_whatever_the_model_averages_over():
    """A classifier averages over rows, a masked language model over all labels, unshifted."""
    rows = Rows()
    kind = KINDS["bert"]
    model = kind.build(torch.float64)
    inputs = rows.batch() | {"labels": torch.tensor([0, 1, 1])}
    memory = collected(model, [inputs])
    names = list(memory.sides)

    def of_class(i):
        logits = model(input_ids=rows.ids[i][None]).logits
        return F.cross_entropy(logits, inputs["labels"][i : i + 1], reduction="sum")

    found = by_hand(model, names, [partial(of_class, i) for i in range(3)])
    for name, (x, g) in found.items():
        assert_sums(memory.of(name)[0], g)
        assert_sums(memory.of(name)[1], x)

    torch.manual_seed(0)
    options = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForMaskedLM(BertConfig(vocab_size=40, num_hidden_layers=1, **options))
    model = model.double().eval()
    for labels in rows.labels:
        labels[0] = 3  # The first token is learned, too.
    memory = collected(model, [rows.batch()])

    def masked(i):
        logits = model(input_ids=rows.ids[i][None]).logits[0]
        return F.cross_entropy(logits, rows.labels[i], reduction="sum", ignore_index=-100)

    (name,) = [name for name in memory.sides if name.endswith("attention.self.query")]
    ((_, g),) = by_hand(model, [name], [partial(masked, i) for i in range(3)]).values()
    assert_sums(memory.of(name)[0], g)


class Shares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x, y):
        return (self.q(x) * self.k(y)).sum()


def test_layers_that_share_an_input_only_in_some_rows():
    torch.manual_seed(0)
    model = Shares()
    x, y = torch.randn(2, 30, 5)
    alike, apart = [lambda model: model(x, x)], [lambda model: model(x, y)]
    with pytest.raises(ValueError, match="'k' reads what 'q' reads in some rows, and something"):
        collected(model, alike + apart)
    for first, second in ((alike, apart), (apart, alike)):
        memory = collected(model, first)
        memory.merge(collected(model, second))
        assert_sums(memory.of("q")[1], torch.cat([x, x]))
        assert_sums(memory.of("k")[1], torch.cat([x, y]))


def test_two_passes_add_up_to_one():
    model, rows = KINDS["linear"].build(), Rows()
    whole = collected(model, [rows.batch(0, 2), rows.batch(1)])
    memory = collected(model, [rows.batch(0, 2)])
    memory.merge(collected(model, [rows.batch(1)]))
    assert memory.rows == whole.rows == {"rows": 3}
    for key, factor in whole.factors.items():
        # Sums of two parts, in one order or the other: one rounding of each.
        limit = 2 * 2.0**-24 * memory.factors[key].total.abs() + 1e-30
        sizes = 4 * 2.0**-24 * factor.total.diagonal().max()
        assert ((factor.total - memory.factors[key].total).abs() <= limit + sizes).all()
        assert torch.equal(factor.count, memory.factors[key].count)
