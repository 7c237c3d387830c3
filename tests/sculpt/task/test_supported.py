"""Models and layers that cannot be sculpted are refused by name, with the way out."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from sculpt import SculptConfig, Sculptor
from sculpt.task.targets import find_targets
from tests.sculpt.small_models import KINDS


@pytest.fixture
def llama():
    return KINDS["tied head and embedding"].build()


def two_layers() -> nn.ModuleDict:
    return nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})


def integers() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def names(model: nn.Module) -> list[str]:
    return [target.name for target in find_targets(model, SculptConfig()).chosen]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(4, 4, 3), "Conv2d has a weight of shape .4, 4, 3, 3., which is not a matrix"),
        (nn.Conv1d(4, 4, 3), "Conv1d has a weight of shape"),
        (nn.LayerNorm(4), "LayerNorm has no weight that is a matrix"),
        (nn.Tanh(), "Tanh has no weight"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight holds three matrices.*out_proj can be"),
        (nn.GRUCell(4, 4), "weight_ih is a parameter that GRUCell reads by itself"),
        (nn.Embedding(9, 4, max_norm=1.0), "Embedding with max_norm=1.0 is not supported"),
        (nn.Embedding(9, 4, sparse=True), "Embedding with sparse=True is not supported"),
        (nn.Embedding(9, 4, scale_grad_by_freq=True), "Embedding with scale_grad_by_freq=True is"),
        (integers(), "its weight is torch.int8, not a floating dtype"),
        (
            nn.Linear(4, 4).to(torch.complex64),
            "its weight is torch.complex64, not a floating dtype",
        ),
    ],
)
def test_other_kinds_are_refused_by_name(module, reason):
    with pytest.raises(ValueError, match=rf"matches 'a', which cannot be sculpted: {reason}"):
        Sculptor(nn.ModuleDict({"a": module}), SculptConfig(target_modules=["a"]))


def test_quantised_models_are_refused_with_the_way_out(llama):
    class Linear4bit(nn.Linear):
        pass

    Linear4bit.__module__ = "bitsandbytes.nn.modules"
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Linear4bit(4, 4)})
    with pytest.raises(ValueError, match=r"'b' is a Linear4bit of bitsandbytes.*dequantise it"):
        Sculptor(model, SculptConfig())
    llama.config.quantization_config = {"quant_method": "gguf"}
    with pytest.raises(ValueError, match=r"a quantization_config \(gguf\).*fresh model"):
        Sculptor(llama, SculptConfig())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("in_proj_weight", "in_proj_weight holds three matrices.*its out_proj can be sculpted"),
        ("weight_hh_l0", "weight_hh_l0 is a parameter that GRU reads by itself"),
        ("list.0", "0 is a parameter that ParameterList reads by itself"),
        ("table", "table is a parameter that Other reads by itself"),
        ("in_proj_bias", r"its shape \(24,\) is not that of a matrix"),
    ],
)
def test_a_matrix_that_is_no_weight_of_a_layer_has_its_reason(name, reason):
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(4, 4))
            self.attention = nn.MultiheadAttention(8, 2)
            self.gru = nn.GRU(4, 4)
            self.list = nn.ParameterList([torch.zeros(4, 4)])

    for targets in ([name], f".*{name}", ["out_proj", name]):
        with pytest.raises(ValueError, match=rf"{name}', which cannot be sculpted: {reason}"):
            Sculptor(Other(), SculptConfig(target_modules=targets))
    found = find_targets(Other(), SculptConfig())
    assert [target.name for target in found.chosen] == ["attention.out_proj"]
    for full in ("attention.in_proj_weight", "gru.weight_ih_l0", "list.0", "table"):
        assert "reads by itself" in found.left_out[full]


def pruned(layer: nn.Linear, name: str = "weight") -> nn.Linear:
    prune.l1_unstructured(layer, name, amount=0.5)
    return layer


def old_weight_norm(layer: nn.Linear) -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


COMPUTED = {
    "weight_norm": (old_weight_norm, nn.utils.remove_weight_norm, "utils.remove_weight_norm"),
    "spectral_norm": (
        nn.utils.spectral_norm,
        nn.utils.remove_spectral_norm,
        "utils.remove_spectral_norm",
    ),
    "pruning": (pruned, prune.remove, "utils.prune.remove"),
    "_WeightNorm": (
        parametrizations.weight_norm,
        parametrize.remove_parametrizations,
        "utils.parametrize.remove_parametrizations",
    ),
}
COMPUTED["_Orthogonal"] = (parametrizations.orthogonal, *COMPUTED["_WeightNorm"][1:])


@pytest.mark.parametrize("what", COMPUTED)
def test_computed_weights_are_named_with_the_way_out(what):
    compute, undo, way_out = COMPUTED[what]
    model = two_layers()
    parts = {f"a.{name}" for name, _ in compute(model["a"]).named_parameters()} - {"a.bias"}
    message = rf"computed from other parameters by .*{what}.*; torch\.nn\.{way_out}\(module, 'w"
    found = find_targets(model, SculptConfig())
    assert [target.name for target in found.chosen] == ["b"]
    assert re.search(message, found.left_out["a"])
    assert {found.left_out[name] for name in parts} == {"part of 'a'"}
    with pytest.raises(ValueError, match=f"every matching matrix is .*'a'.*{message}"):
        Sculptor(nn.ModuleDict({"a": model["a"]}), SculptConfig())
    for name in ("a", *parts):
        with pytest.raises(ValueError, match=f"'{name}', which cannot be sculpted: .*{message}"):
            Sculptor(model, SculptConfig(target_modules=["b", name]))
    assert find_targets(model, SculptConfig(exclude_modules=["a"])).left_out["a"] == (
        "in exclude_modules"
    )
    undo(model["a"], "weight")
    assert names(model) == ["a", "b"]


@pytest.mark.parametrize("compute", [old_weight_norm, parametrizations.weight_norm])
def test_parts_of_a_convolution_are_no_stacks_of_matrices(compute):
    model = nn.ModuleDict({"a": compute(nn.Conv1d(4, 4, 3)), "b": nn.Linear(4, 4)})
    parts = {f"a.{name}" for name, _ in model["a"].named_parameters()} - {"a.bias"}
    for name in parts:
        with pytest.raises(ValueError, match=f"'{name}', which cannot be sculpted: its weight is"):
            Sculptor(model, SculptConfig(target_modules=[name]))
    left_out = find_targets(model, SculptConfig()).left_out
    assert {left_out[name] for name in parts} == {"not in target_modules"}


def test_a_layer_without_a_shape_yet_is_refused():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"0.weight is not initialised.*call the model once"):
        Sculptor(model, SculptConfig())
    model(torch.zeros(1, 3))
    assert names(model) == ["0", "1"]


def with_adapter(llama: nn.Module, kind: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    if kind == "add_adapter":
        llama.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
        return llama
    if kind == "prompt":
        return peft.get_peft_model(
            llama, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        )
    config = {
        "lora": peft.LoraConfig(target_modules=["q_proj"]),
        "osf": peft.OSFConfig(target_modules=["q_proj"], effective_rank=3),
    }
    return peft.get_peft_model(llama, config[kind])


@pytest.mark.parametrize(
    ("kind", "way_out"),
    [
        ("lora", r"model = model.merge_and_unload\(\), then model.requires_grad_\(True\)"),
        ("osf", r"model = model.merge_and_unload\(\)"),
        ("prompt", r"model = model.get_base_model\(\), then model.requires_grad_\(True\)"),
        ("add_adapter", r"model = PeftModel.from_pretrained\(plain_model, folder\).merge_and_un"),
    ],
)
def test_adapters_of_peft_are_refused_with_the_way_out(llama, tmp_path, kind, way_out):
    model = with_adapter(llama, kind)
    for targets in ("all-linear", ["up_proj"]):
        with pytest.raises(ValueError, match=f"is of PEFT: adapters are not sculpted.*{way_out}"):
            Sculptor(model, SculptConfig(target_modules=targets))
    if kind == "add_adapter":
        from peft import PeftModel

        model.save_pretrained(tmp_path)
        plain = PeftModel.from_pretrained(type(llama)(llama.config), tmp_path)
        model = plain.merge_and_unload()
    else:
        model = model.get_base_model() if kind == "prompt" else model.merge_and_unload()
    with pytest.raises(ValueError, match="every matching matrix is frozen"):
        Sculptor(model, SculptConfig())
    assert len(names(model.requires_grad_(True))) == 14


def test_adapters_of_others_are_refused_by_their_names():
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.lora_A = nn.Parameter(torch.zeros(2, 4))
            self.lora_B = nn.Parameter(torch.zeros(4, 2))

    for layer, name in (
        (Adapted(), "lora_A"),
        (nn.ModuleDict({"lora_a": nn.Linear(4, 2)}), "lora_a"),
    ):
        model = nn.ModuleDict({"a": layer, "b": nn.Linear(4, 4)})
        with pytest.raises(ValueError, match=f"has the adapter '{name}': adapters are not"):
            Sculptor(model, SculptConfig(target_modules=["b"]))
