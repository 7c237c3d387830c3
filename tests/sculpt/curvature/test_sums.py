"""What is protected goes to a file and comes back bit by bit, to its own model alone."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sculpt import SculptConfig, Sculptor
from sculpt.curvature.memory import Memory, Sides
from tests.sculpt.curvature.oracle import Rows, collected
from tests.sculpt.curvature.test_factors import made, vectors
from tests.sculpt.small_models import KINDS, LLAMA


def assert_same(one: Memory, other: Memory) -> None:
    assert one.sides == other.sides
    assert one.rows == other.rows
    assert list(one.factors) == list(other.factors)
    for key, factor in one.factors.items():
        assert factor.kind == other.factors[key].kind
        for name, tensor in factor.tensors().items():
            twin = other.factors[key].tensors()[name]
            assert tensor.dtype == twin.dtype
            assert torch.equal(tensor, twin), (key, name)


def protected(kind: str, **options) -> tuple[nn.Module, Sculptor]:
    model = KINDS[kind].build()
    sculptor = Sculptor(model, SculptConfig(target_modules=KINDS[kind].targets, **options))
    sculptor.protect([Rows().batch()], "some")
    return model, sculptor


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {}),
        ("linear", {"sketch_rank": 4, "factor_bytes": 20_000}),
        ("mixtral experts", {}),
        ("tied head and embedding", {}),
    ],
)
@pytest.mark.parametrize("name", ["", "mine.safetensors"])
def test_a_file_has_every_bit(kind, options, name, tmp_path):
    model, sculptor = protected(kind, **options)
    kinds = {factor.kind for factor in sculptor.memory.factors.values()}
    assert ("sketch" in kinds) == bool(options)
    sculptor.save_memory(tmp_path / name)
    assert (tmp_path / (name or "sculpt_memory.safetensors")).is_file()
    other = Sculptor(copy.deepcopy(model), sculptor.config)
    other.load_memory(tmp_path / name)
    assert_same(other.memory, sculptor.memory)
    # What is loaded is added to what there is.
    other.load_memory(tmp_path / name)
    assert other.memory.rows == {"some": 6}
    for key, factor in sculptor.memory.factors.items():
        assert torch.equal(other.memory.factors[key].total, 2 * factor.total)


def another(**changes) -> Sculptor:
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | changes))
    return Sculptor(model, SculptConfig())


def test_a_file_of_something_else_is_refused(tmp_path):
    model, sculptor = protected("linear")
    sculptor.save_memory(tmp_path)
    file = tmp_path / "sculpt_memory.safetensors"
    good = load_file(file)
    about, first = good["about"], next(key for key in good if key.endswith("/total"))

    def refused(target: Sculptor, error: type[Exception], match: str) -> None:
        target.memory = Memory({}, {}, {})
        with pytest.raises(error, match=match):
            target.load_memory(file)
        assert not target.memory
        assert not target.memory.factors

    refused(another(num_hidden_layers=1), ValueError, "of a model with another configuration")
    plain = nn.Sequential(nn.Linear(16, 16))
    refused(Sculptor(plain, SculptConfig()), ValueError, "with another configuration")
    few = Sculptor(model, SculptConfig(target_modules=["q_proj"]))
    refused(few, ValueError, "of another model or of other targets: it has model.layers.0.self_a")
    for changed, match in (
        ({"about": about[:-9]}, "is damaged: JSONDecodeError"),
        ({first: torch.tensor([torch.nan])}, "is damaged: .* not finite"),
        ({first: torch.zeros(3, 3)}, "does not fit"),
    ):
        save_file(good | changed, file)
        refused(sculptor, ValueError, match)
    save_file({key: tensor for key, tensor in good.items() if key != first}, file)
    refused(sculptor, ValueError, "is damaged: TypeError")
    save_file({"weight": torch.zeros(2)}, file)
    refused(sculptor, ValueError, "was not written by Sculptor.save_memory")
    file.write_bytes(file.read_bytes()[:20])
    refused(sculptor, ValueError, "cannot be read")
    file.unlink()
    refused(sculptor, FileNotFoundError, "does not exist; Sculptor.save_memory writes it")


def test_a_model_is_known_by_what_does_not_change(tmp_path):
    """Its dtype, the version that wrote it and where it was read from say nothing."""
    model, sculptor = protected("linear")
    sculptor.save_memory(tmp_path)
    again = copy.deepcopy(model).bfloat16()
    again.config.dtype, again.config.use_cache = torch.bfloat16, False
    again.config._name_or_path = "elsewhere"
    again.config.inner = {"dtype": "bfloat16"}
    model.config.inner = {"dtype": "float32"}
    sculptor.save_memory(tmp_path)
    other = Sculptor(again, SculptConfig())
    other.load_memory(tmp_path)
    assert_same(other.memory, sculptor.memory)


def test_nothing_is_saved_where_nothing_is_protected(tmp_path):
    with pytest.raises(RuntimeError, match="nothing is protected"):
        another().save_memory(tmp_path)
    assert not list(tmp_path.iterdir())


def test_factors_of_other_kinds_do_not_add_up():
    X = vectors(20, 12)
    sides = {"w": Sides("w.left", "w.right")}
    one = Memory({"w.left": made("full", X), "w.right": made("full", X)}, sides, {"a": 1})
    other = Memory({"w.left": made("full", X), "w.right": made("sketch", X)}, sides, {"b": 1})
    before = copy.deepcopy(one)
    with pytest.raises(ValueError, match=r"'w.right' is full \(12, 12\) .* and sketch \(12, 8\)"):
        one.merge(other)
    assert_same(one, before)


def test_a_weight_that_is_read_in_two_ways_has_no_outputs():
    X = vectors(20, 12)
    one, other = (
        Memory(
            {"w.left": made("full", X), "w.right": made("full", X)},
            {"w": Sides("w.left", "w.right", reads)},
            {"": 1},
        )
        for reads in ("left", "right")
    )
    W = torch.randn(12, 12, dtype=torch.float64)
    F = X.double().mT @ X.double()
    assert float(one.outputs("w", W)) == pytest.approx(float((W.mT @ F @ W).trace()), rel=1e-5)
    assert float(other.outputs("w", W)) == pytest.approx(float((W @ F @ W.mT).trace()), rel=1e-5)
    one.merge(other)
    assert one.outputs("w", W) is None
    assert one.outputs("another", W) is None


def test_what_is_new_is_collected_as_what_is_known():
    """Kinds and columns are those of what is protected, whatever is asked for now."""
    model, sculptor = protected("linear", sketch_rank=4, factor_bytes=20_000)
    found = collected(model, [Rows().batch()], sculptor.memory, sketch_rank=9)
    for key, factor in sculptor.memory.factors.items():
        assert found.factors[key].kind == factor.kind
        assert found.factors[key].total.shape == factor.total.shape
    sculptor.memory.merge(found)
    assert sculptor.memory.rows == {"some": 3, "rows": 3}
