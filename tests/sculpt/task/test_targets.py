"""Targets by PEFT's rules; everything left out has a reason."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from sculpt import SculptConfig, Sculptor
from sculpt.task.targets import find_targets
from tests.sculpt.small_models import KINDS


@pytest.fixture
def llama():
    return KINDS["tied head and embedding"].build()


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


def test_all_linear_and_more_and_no_part_of_a_name(llama):
    assert names(llama, target_modules=["all-linear", "lm_head"]) == [*names(llama), "lm_head"]
    assert names(llama, target_modules=["all-linear"]) == names(llama)
    with pytest.raises(
        ValueError, match=r"'_proj' matches nothing.*linear layers end in down_proj"
    ):
        names(llama, target_modules=["_proj", "o_proj"])


@pytest.mark.parametrize(
    ("targets", "exclude"),
    [
        ("all-linear", None),
        ("all-linear", ["q_proj", "layers.1.mlp.up_proj"]),
        ("all-linear", r".*layers\.0\..*"),
        (["q_proj", "layers.1.mlp.up_proj"], None),
        (r".*layers\.1\.mlp\.(up|down)_proj", None),
        (r".*_proj", r".*\.mlp\..*"),
    ],
)
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")
def test_names_mean_what_they_mean_to_peft(llama, targets, exclude):
    peft = pytest.importorskip("peft")
    alike = {"target_modules": targets, "exclude_modules": exclude}
    alike["rank_pattern"] = {"q_proj": 3, r"1\..*": 5}
    config = peft.LoraConfig(r=7, **alike)
    adapted = peft.get_peft_model(deepcopy(llama), config).base_model.model
    ranks = {n: m.r["default"] for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    ours = find_targets(llama, SculptConfig(effective_rank=7, **alike)).chosen
    assert {target.name: target.preserved for target in ours} == ranks


def test_a_name_without_a_match_is_refused_with_the_nearest(llama):
    for targets in (["qproj"], ["k_proj", "qproj"], ["all-linear", "qproj"], "qproj"):
        with pytest.raises(ValueError, match=r"'qproj' matches nothing; did you mean 'q_proj'"):
            Sculptor(llama, SculptConfig(target_modules=targets))
    with pytest.raises(ValueError, match=r"rank_pattern=.*'qproj' matches nothing; did you mean"):
        Sculptor(llama, SculptConfig(rank_pattern={"qproj": 3}))
    with pytest.raises(
        ValueError, match=r"goes by the name of its module, 'model.layers.0.*q_proj'"
    ):
        Sculptor(llama, SculptConfig(target_modules=["q_proj.weight"]))
    with pytest.raises(ValueError, match="has no linear layer and no stack of experts"):
        Sculptor(nn.Tanh(), SculptConfig())


def two_layers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})


def test_frozen_weights_stay_as_they_are_and_are_listed():
    model = two_layers()
    model["a"].requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = model["a"].weight.clone()
    x = torch.randn(4, 8)
    for frozen in (True, True, False):
        model["a"].weight.requires_grad_(not frozen)
        sculptor = Sculptor(model, SculptConfig())
        table = sculptor.begin_task()
        assert [row.name for row in table.rows] == (["b"] if frozen else ["a", "b"])
        optimizer = torch.optim.AdamW(sculptor.parameters(), lr=1e-2)
        sculptor.attach(optimizer)
        (model["b"](x) + model["a"](x)).square().sum().backward()
        optimizer.step()
        sculptor.end_task()
        assert torch.equal(model["a"].weight, before) is frozen
        if frozen:
            assert "a.weight: frozen: requires_grad is False" in str(table)
            assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("others", ["freeze", "train"])
def test_a_frozen_weight_is_left_out_whoever_names_it(others):
    model = two_layers()
    model.update({"c": nn.Conv2d(2, 2, 1), "d": nn.Embedding(8, 8)})
    model["d"].weight = model["a"].weight
    model.requires_grad_(False)
    model["b"].weight.requires_grad_(True)
    config = SculptConfig(target_modules=["a", "b", "c", "d"], others=others)
    table = Sculptor(model, config).begin_task()
    assert [row.name for row in table.rows] == ["b"]
    frozen = {name for name, reason in table.left_out.items() if reason.startswith("frozen")}
    assert frozen == {"a.weight", "c.weight", "d.weight"}
    assert table.others == []


def test_a_model_that_is_frozen_as_a_whole_says_what_to_do(llama):
    llama.requires_grad_(False)
    message = r"every matching matrix is frozen \('model.layers.0.*requires_grad_\(True\)"
    for targets in ("all-linear", ["q_proj", "lm_head"], ".*_proj"):
        with pytest.raises(ValueError, match=message):
            Sculptor(llama, SculptConfig(target_modules=targets))
    llama.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    assert names(llama) == ["model.layers.0.self_attn.q_proj"]
    with pytest.raises(ValueError, match=r"is in exclude_modules=\['q_proj'\], or frozen"):
        names(llama, exclude_modules=["q_proj"])


def test_what_is_excluded_may_be_of_any_kind_and_is_one_of_the_others(llama):
    layer = r"model\.layers\.1\.(self_attn\.\w+|mlp\.\w+|\w+norm)"
    names = ["act_fn", "input_layernorm", "post_attention_layernorm", "up_proj"]
    for missing, kind in ((names[0], "SiLU"), (names[1], "RMSNorm")):
        exclude = [name for name in names if name != missing]
        with pytest.raises(ValueError, match=f"{kind}.* has no weight that is a matrix"):
            Sculptor(llama, SculptConfig(target_modules=layer, exclude_modules=exclude))
    for exclude in (names, r".*(norm|act_fn|up_proj)"):
        config = SculptConfig(target_modules=layer, exclude_modules=exclude, others="train")
        table = Sculptor(deepcopy(llama), config).begin_task()
        assert len(table.rows) == 6
        assert "mlp.up_proj.weight: trains unprotected, in exclude_modules" in str(table)


def test_an_exclusion_counts_for_every_use_of_a_weight(llama):
    for named, excluded in (("lm_head", "embed_tokens"), ("embed_tokens", "lm_head")):
        config = SculptConfig(target_modules=["q_proj", named], exclude_modules=[excluded])
        found = find_targets(llama, config)
        assert len(found.chosen) == 2
        assert found.left_out["lm_head.weight"] == "in exclude_modules"
        assert found.left_out["model.embed_tokens.weight"] == "in exclude_modules"


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (["qproj"], "exclude_modules=.*'qproj' matches nothing; did you mean 'q_proj'"),
        (["q_proj", "vision"], "exclude_modules=.*'vision' matches nothing"),
        ("q_proj", "exclude_modules='q_proj': 'q_proj' matches nothing"),
        (["mlp"], r"'model.layers.0.mlp' has no weight of its own.*layers\\\\.0\\\\.mlp\[.\]"),
        (".*_proj", "every matching matrix is in exclude_modules='.*_proj'"),
    ],
)
def test_exclusions_that_do_not_work_are_refused(llama, exclude, message):
    with pytest.raises(ValueError, match=message):
        Sculptor(llama, SculptConfig(exclude_modules=exclude))


def test_a_shared_module_goes_by_all_its_names():
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(8, 8)})
    found = find_targets(model, SculptConfig(target_modules=["b"]))
    assert [target.name for target in found.chosen] == ["a"]
    assert found.left_out.keys() == {"a.bias", "b.bias", "c.weight", "c.bias"}
    assert names(model, exclude_modules=["b"]) == ["c"]


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
