"""Certificates of 16-bit weights from disk: how much of a change their rounding hides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_language import tiny_model
from torch import nn
from typer.testing import CliRunner

from sculpt import SculptConfig, Sculptor
from sculpt.certificate.disk import DiskCertificate
from sculpt.cli.app import app
from tests.sculpt.certificate.test_verify import RATIO, train, verify

Weights = dict[str, torch.Tensor]


def stored(model: nn.Module) -> Weights:
    """As a checkpoint has them: a tied head goes by the name of the embedding."""
    state = model.state_dict()
    return {name: value.clone() for name, value in state.items() if name != "lm_head.weight"}


@pytest.fixture(scope="module")
def trained() -> tuple[Weights, Weights]:
    """The weights of a float32 model before and after a task."""
    model = tiny_model()
    before = stored(model)
    sculptor = Sculptor(model, SculptConfig(unfreeze_rank_ratio=RATIO))
    train(model, sculptor)
    sculptor.end_task()
    return before, stored(model)


def judged(folder: Path, before: Weights, after: Weights) -> DiskCertificate:
    files = [folder / "before.safetensors", folder / "after.safetensors"]
    for file, weights in zip(files, (before, after), strict=True):
        save_file(weights, file)
    return verify(*files)


def halves(weights: Weights) -> Weights:
    return {name: value.bfloat16() for name, value in weights.items()}


@pytest.mark.parametrize(("size", "told"), [(1.0, True), (0.1, False)])
def test_rounding_that_hides_everything_is_said(trained, tmp_path, size, told):
    before, after = trained
    after = {name: torch.lerp(value, after[name], size) for name, value in before.items()}
    found = judged(tmp_path, halves(before), halves(after))
    assert not found.broken
    assert found.ok is told
    assert bool(found.hidden) is not told
    verdict = str(found).splitlines()[0]
    assert ("The constraint is NOT TOLD for 15 matrices" in verdict) is not told
    assert ("The constraint holds for 15 matrices" in verdict) is told
    assert ("any change would pass" in str(found)) is not told
    rounded = [row for row in found.certificate.rows if row.change > 0]
    # Both are rounded. Each rounding is spread evenly over a spacing: 0.58 of its most.
    shares = [row.rounding / row.rounding_limit for row in rounded]
    assert all(share == pytest.approx((2 / 3) ** 0.5, rel=0.2) for share in shares)
    files = [str(tmp_path / f"{name}.safetensors") for name in ("before", "after")]
    done = CliRunner().invoke(app, ["verify", *files, "--ratio", str(RATIO)])
    assert done.exit_code == (0 if told else 2)
    assert done.output.splitlines()[0] == verdict


def test_a_little_noise_on_16_bit_weights_breaks_the_certificate(trained, tmp_path):
    before, after = map(halves, trained)
    assert not judged(tmp_path, before, after).broken
    name = "model.layers.0.mlp.up_proj.weight"
    noise = torch.randn(after[name].shape, generator=torch.Generator().manual_seed(0))
    # As large as two roundings.
    noisy = after[name] + (0.01 * noise * after[name].abs()).bfloat16()
    found = judged(tmp_path, before, after | {name: noisy})
    assert [row.name for row in found.certificate.rows if not row.ok] == [name[: -len(".weight")]]


@pytest.mark.parametrize(
    ("options", "rounds_each_step"),
    [({}, True), ({"weight_update": "recompute"}, False), ({"engine": "update"}, False)],
    ids=["stochastic", "recompute", "update"],
)
def test_a_checkpoint_from_the_middle_of_a_task(options, rounds_each_step, tmp_path):
    model = tiny_model().bfloat16()
    before = stored(model)
    sculptor = Sculptor(model, SculptConfig(unfreeze_rank_ratio=RATIO, **options))
    train(model, sculptor)
    found = judged(tmp_path, before, stored(model))
    assert found.broken is rounds_each_step
    assert ("rounded once at the end of a task, and in each step" in str(found)) is found.broken
    sculptor.end_task()
    assert judged(tmp_path, before, stored(model)).ok
