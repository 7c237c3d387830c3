"""General ability before and after a run, by a stand-in for `lm-eval`."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_runs import run_config

from sculpt.runs.directory import RunError
from sculpt.runs.start import run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the stand-in was asked for; it answers with the mean of the first weight."""
    calls: list[dict[str, Any]] = []

    class HFLM:
        """A language model of `lm-eval`."""

        def __init__(self, pretrained: torch.nn.Module, tokenizer: Any) -> None:
            assert not pretrained.training
            self.model = pretrained

    def simple_evaluate(model: HFLM, **options: Any) -> dict[str, Any]:
        calls.append(options)
        torch.manual_seed(1234)
        weight = next(p for n, p in model.model.named_parameters() if "q_proj" in n)
        scores = {"alias": "piqa", "sample_len": 2, "acc_stderr,none": 0.1}
        return {"results": {"piqa": scores | {"acc,none": float(weight.detach().mean())}}}

    package, inner = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    package.__spec__ = ModuleSpec("lm_eval", None)
    inner.HFLM = HFLM  # type: ignore[attr-defined]
    for name in ("lm_eval", "lm_eval.models"):
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", inner)
    return calls


def test_it_is_measured_before_and_after_and_disturbs_nothing(
    tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    training = {"steps": 2, "lr": 1e-2, "dropout": True}
    evaluation = {"lm_eval": ["piqa"], "lm_eval_limit": 5}
    config = run_config(tmp_path, training=training, evaluation=evaluation)
    result = run(config).methods["sculpt"]
    assert asked == [{"tasks": ["piqa"], "limit": 5}] * 2
    assert result.general_scores.keys() == {"before", "after"}
    assert result.general_scores["before"].keys() == {"piqa acc"}
    assert result.general_scores["before"] != result.general_scores["after"]
    written = json.loads((config.out / "results.json").read_text())
    assert written["methods"]["sculpt"]["general_scores"] == result.general_scores
    without = run(run_config(tmp_path, training=training, out=str(tmp_path / "without")))
    assert without.methods["sculpt"].losses == result.losses


def test_without_the_package_nothing_begins(tmp_path: Path) -> None:
    config = run_config(tmp_path, evaluation={"lm_eval": ["piqa"]})
    with pytest.raises(
        RunError, match=r"\['piqa'\]: lm-eval is not installed: pip install lm-eval"
    ):
        run(config)
    assert not config.out.exists()
