"""Patterns on names of stored weights: what `sculpt verify` lets change, and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sculpt import SculptConfig
from sculpt.certificate.disk import DiskCertificate, verify_checkpoints

NAMES = (
    "layers.0.q_proj.weight",
    "layers.0.k_proj.weight",
    "layers.1.q_proj.weight",
    "head.weight",
)


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the same one with every matrix changed without any constraint."""
    torch.manual_seed(0)
    before = {name: torch.randn(8, 8) for name in NAMES} | {"norm.weight": torch.ones(8)}
    before |= {"experts.up_proj": torch.randn(2, 8, 8), "experts.bias": torch.randn(2, 8)}
    changed = {"experts.up_proj", *NAMES}
    after = {name: W + 1.0 if name in changed else W for name, W in before.items()}
    save_file(before, tmp_path / "before.safetensors")
    save_file(after, tmp_path / "after.safetensors")
    return tmp_path / "before.safetensors", tmp_path / "after.safetensors"


def verify(checkpoints: tuple[Path, Path], **fields) -> DiskCertificate:
    return verify_checkpoints(*checkpoints, SculptConfig(**fields))


@pytest.mark.parametrize(
    ("targets", "exclude", "judged"),
    [
        (["q_proj"], ["layers.1.q_proj"], {"layers.0.q_proj"}),
        (
            r".*_proj",
            r"layers\.0\..*",
            {"layers.1.q_proj", "experts.up_proj[0]", "experts.up_proj[1]"},
        ),
        (["experts", "head"], ["norm"], {"experts.up_proj[0]", "experts.up_proj[1]", "head"}),
        (["experts", "head"], ["experts"], {"head"}),
        (["all-linear", "head"], ["q_proj", "k_proj", "experts"], {"head"}),
    ],
)
def test_what_is_excluded_may_not_change(checkpoints, targets, exclude, judged):
    found = verify(checkpoints, target_modules=targets, exclude_modules=exclude)
    assert {row.name for row in found.certificate.rows} == judged
    modules = {name.partition("[")[0] for name in judged}
    moved = {name.removesuffix(".weight") for name in found.moved}
    assert moved == {name.removesuffix(".weight") for name in (*NAMES, "experts.up_proj")} - modules


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "vproj"]}, "target_modules=.*'vproj' matches nothing; did"),
        ({"target_modules": "proj"}, "target_modules='proj': 'proj' matches nothing; .*before"),
        ({"exclude_modules": ["qproj"]}, "exclude_modules=.*'qproj' matches nothing; did you mean"),
        (
            {"exclude_modules": ".*"},
            "exclude_modules='.*' leave no matrix of .*, which has experts",
        ),
        ({"rank_pattern": {"qproj": 3}}, "rank_pattern=.*'qproj' matches nothing; did you mean"),
    ],
)
def test_patterns_without_a_match_are_refused(checkpoints, options, message):
    with pytest.raises(ValueError, match=message):
        verify(checkpoints, **options)
