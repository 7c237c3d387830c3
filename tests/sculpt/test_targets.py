"""Targets by PEFT's rules; everything left out has a reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sculpt import SculptConfig, Sculptor
from sculpt.targets import find_targets


@pytest.fixture
def llama():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def names(model: nn.Module, **kwargs) -> list[str]:
    return [target.name for target in find_targets(model, SculptConfig(**kwargs)).chosen]


def test_all_linear_leaves_the_output_embedding_and_says_why(llama):
    found = find_targets(llama, SculptConfig())
    assert len(found.chosen) == 14
    assert all(".layers." in target.name for target in found.chosen)
    covered = {f"{target.name}.weight" for target in found.chosen} | set(found.left_out)
    assert covered == {name for name, _ in llama.named_parameters(remove_duplicate=False)}
    assert found.left_out["lm_head.weight"] == "output embedding"
    assert "RMSNorm" in found.left_out["model.norm.weight"]


def test_suffixes_and_regular_expressions(llama):
    assert names(llama, target_modules=["q_proj"]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert names(llama, target_modules=["_proj", "o_proj"]) == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
    ]
    assert names(llama, target_modules=r".*layers\.1\.mlp\.(up|down)_proj") == [
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_left_out_linear_layers_and_biases_are_listed():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    left_out = find_targets(model, SculptConfig(target_modules=["a"])).left_out
    assert left_out == {
        "a.bias": "bias: only matrices are sculpted",
        "b.weight": "not in target_modules",
        "b.bias": "bias: only matrices are sculpted",
    }


def test_nothing_matches_names_what_there_is(llama):
    with pytest.raises(ValueError, match=r"'qproj'.* end in down_proj, gate_proj"):
        Sculptor(llama, SculptConfig(target_modules=["qproj"]))


def test_shared_and_unusable_weights():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    found = find_targets(model, SculptConfig(target_modules=["b"])).chosen
    assert [place.name for place in found[0].places] == ["b", "a"]
    with pytest.raises(ValueError, match="too few directions"):
        Sculptor(nn.ModuleDict({"a": nn.Linear(4, 1)}), SculptConfig(target_modules=["a"]))
    with torch.device("meta"):
        meta = nn.ModuleDict({"a": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="meta device"):
        Sculptor(meta, SculptConfig(target_modules=["a"]))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(4, 4, 3), "Conv2d has a weight of shape .4, 4, 3, 3., which is not a matrix"),
        (nn.Conv1d(4, 4, 3), "Conv1d has a weight of shape"),
        (nn.LayerNorm(4), "LayerNorm has no weight that is a matrix"),
        (nn.Tanh(), "Tanh has no weight"),
        (nn.Embedding(9, 4, max_norm=1.0), "Embedding with max_norm=1.0 is not supported"),
        (nn.Embedding(9, 4, sparse=True), "Embedding with sparse=True is not supported"),
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
