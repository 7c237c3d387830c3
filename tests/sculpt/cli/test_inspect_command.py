"""`sculpt inspect`: what it reads, what it refuses, what it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    T5Config,
)
from typer.testing import CliRunner

from sculpt import SculptConfig
from sculpt.cli.app import app
from sculpt.inspection import inspect_model
from sculpt.inspection.spectra import summarise

CONFIG = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def command(*arguments: object):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "little"
    AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG)).save_pretrained(path)
    return path


def test_spectra_are_those_of_the_stored_weights(directory):
    found = inspect_model(directory, SculptConfig(unfreeze_rank_ratio=0.25), tokens=64)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert len(found.rows) == 14
    for row in found.rows:
        S = torch.linalg.svdvals(model.get_parameter(f"{row.matrix.name}.weight").detach().double())
        h = row.matrix.preserved
        spectrum = row.spectrum
        assert spectrum.largest == pytest.approx(float(S[0]), rel=1e-9)
        assert spectrum.at_cut == pytest.approx(float(S[h - 1]), rel=1e-9)
        assert spectrum.smallest == pytest.approx(float(S[-1]), rel=1e-5)
        energy = float(S[:h].square().sum() / S.square().sum())
        assert spectrum.energy == pytest.approx(energy, rel=1e-9)
        stable = float(S.square().sum() / S[0] ** 2)
        assert spectrum.stable_rank == pytest.approx(stable, rel=1e-9)
        assert spectrum.curve[0] == 1
        assert list(spectrum.curve) == sorted(spectrum.curve, reverse=True)


def test_several_files_and_those_of_the_body_alone_read_the_same(directory, tmp_path):
    """Names may lack or have the prefix of the base model."""
    model, body = AutoModelForCausalLM.from_pretrained(directory), tmp_path / "body"
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    model.model.save_pretrained(body)
    config = json.loads((body / "config.json").read_text())
    (body / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    expected = [row.spectrum for row in inspect_model(directory, tokens=64).rows]
    for path in (tmp_path / "parts", body):
        assert [row.spectrum for row in inspect_model(path, tokens=64).rows] == expected


def test_a_zero_matrix_and_a_stack_have_a_spectrum_too():
    assert summarise(torch.zeros(4, 6), 2).energy == 1
    stack = torch.stack([torch.eye(4), 3 * torch.eye(4)])
    assert summarise(stack, 3).energy == pytest.approx(0.75)
    assert summarise(stack, 3).largest == pytest.approx(2)


def test_a_configuration_alone_is_enough(directory, tmp_path):
    alone = tmp_path / "config.json"
    alone.write_text((directory / "config.json").read_text())
    found = inspect_model(alone, tokens=64)
    assert all(row.spectrum is None for row in found.rows)
    assert any("no spectra" in note for note in found.notes)
    with_weights = inspect_model(directory, tokens=64)
    assert found.methods == with_weights.methods
    assert "no spectra" not in str(with_weights)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2), "BertModel"),
        (T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2),
         "T5ForConditionalGeneration"),
    ],
    ids=["bert", "t5"],
)  # fmt: skip
def test_other_architectures(config, kind):
    config.architectures = [kind]
    config.intermediate_size = 48
    found = inspect_model(config, tokens=64, sequence=32)
    assert found.notes == ["no spectra: there is only a configuration"]
    assert all(found.methods[name].flops > 0 for name in ("plain", "sculpt"))


def test_what_cannot_be_run_without_values_is_said_and_the_rest_is_given(monkeypatch):
    from sculpt.inspection import estimate

    def fails(*_, **__):
        raise RuntimeError("depends on data")

    monkeypatch.setattr(estimate, "trace_pass", fails)
    found = inspect_model(LlamaConfig(**CONFIG, architectures=["LlamaForCausalLM"]), tokens=64)
    assert any("depends on data" in note for note in found.notes)
    assert found.methods["sculpt"].flops is None
    assert found.methods["sculpt"].cost.held > 0
    assert "depends on data" in str(found)


def test_command_shows_methods_matrices_and_spectra(directory):
    done = command(directory, "--ratio", 0.5, "--tokens", 64)
    assert done.exit_code == 0, done.output
    words = ("plain full fine-tuning", "LoRA r32", "PEFT OSF", "FLOPs of a whole step")
    assert all(word in done.output for word in words)
    assert "self_attn.q_proj" in done.output
    assert "energy preserved" in done.output
    assert "…" not in done.output.replace("model.layers.*.…", "")  # Nothing is cut off.
    every = command(directory, "--tokens", 64, "--all", "--no-spectra")
    assert "1.self_attn.q_proj" in every.output
    assert "energy preserved" not in every.output


def test_command_speaks_json(directory):
    done = command(directory, "--json", "--tokens", 64, "--state-dtype", "trained")
    found = json.loads(done.output)
    assert set(found["methods"]) == {"plain", "sculpt", "lora", "osf"}
    assert len(found["rows"]) == 14
    assert found["rows"][0]["matrix"]["trainable_rank"] == 8
    assert found["methods"]["plain"]["cost"]["held"] > found["methods"]["plain"]["cost"]["weights"]


@pytest.mark.parametrize(
    ("targets", "exclude", "count"),
    [
        ("q_proj", None, 2),
        ("q_proj,up_proj", None, 4),
        ("all-linear,lm_head", None, 15),
        ("all-linear", "q_proj", 12),
        ("all-linear", "q_proj,model.layers.0.mlp.up_proj", 11),
        (r".*layers\.\d\.mlp\..*_proj", r".*layers\.1\..*", 3),
    ],
)
def test_patterns_of_the_command(directory, targets, exclude, count):
    options = ["--target-modules", targets, *(["--exclude-modules", exclude] if exclude else [])]
    done = command(directory, "--json", "--no-spectra", "--tokens", 64, *options)
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.output)["rows"]) == count


def refused(*arguments: object) -> str:
    done = command(*arguments)
    assert done.exit_code == 2, done.output
    assert done.output.startswith("error: ")
    return done.output


def test_typing_errors_in_a_path(directory):
    assert f"did you mean {str(directory)!r}" in refused(directory.parent / "litle")
    message = refused(directory.parent / "nothing-like-it")
    assert "does not exist; expected a Hugging Face model directory" in message
    assert "no config.json" in refused(directory.parent)
    assert "expected a Hugging Face model directory" in refused(directory / "model.safetensors")


def test_quantised_weights_are_refused_with_a_way_out(directory, tmp_path):
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model.Q4_1.gguf").write_bytes(b"GGUF")
    assert "gguf_file=" in refused(gguf)
    assert "gguf_file=" in refused(gguf / "model.Q4_1.gguf")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "quantised by bitsandbytes" in refused(tmp_path / "config.json")


def test_adapters_broken_files_and_unknown_models(directory, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "PEFT adapter" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    assert "cannot be read" in refused(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    assert "no-such-model" in refused(tmp_path)
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    assert "damaged" in refused(tmp_path)
    other = LlamaConfig(**CONFIG | {"intermediate_size": 64})
    AutoModelForCausalLM.from_config(other).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text((directory / "config.json").read_text())
    assert "config.json says" in refused(tmp_path / "other", "--tokens", 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", 1.0], "unfreeze_rank_ratio=1.0 preserves nothing"),
        (["--tokens", 0], "tokens must be an int of at least 1; got 0"),
        (["--tokens", 100, "--sequence", 64], "multiple of sequence x micro_batches = 64 x 1"),
        (["--sequence", 10**6], "longer than"),
        (["--dtype", "float31"], "dtype must be one of"),
        (["--state-dtype", "float8"], "state_dtype must be one of"),
        (["--target-modules", "nothing"], "matches nothing"),
        (["--exclude-modules", "qproj"], "'qproj' matches nothing; did you mean 'q_proj'"),
    ],
)
def test_options_that_do_not_fit(directory, options, message):
    assert message in refused(directory, *options)


def test_every_common_kind_of_layer_is_counted():
    gpt2 = GPT2Config(n_embd=32, n_layer=1, n_head=2, architectures=["GPT2LMHeadModel"])
    found = inspect_model(gpt2, tokens=64)
    assert {row.matrix.shape for row in found.rows} == {(96, 32), (32, 32), (128, 32), (32, 128)}
    moe = MixtralConfig(**CONFIG, num_local_experts=4, dtype="bfloat16")
    moe.architectures = ["MixtralForCausalLM"]
    found = inspect_model(moe, tokens=64)
    experts = [row.matrix for row in found.rows if row.matrix.count == 4]
    assert [m.shape for m in experts[:2]] == [(96, 32), (32, 48)]
    assert "×8" in str(found)
