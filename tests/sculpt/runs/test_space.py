"""What a run takes on the disk is known beforehand, and a disk that is too small is refused."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from kills import fingerprint
from tiny_runs import run_config, run_until

from bench.baselines import BASELINES
from sculpt.runs.config import RunConfig
from sculpt.runs.directory import RunDirectory, RunError
from sculpt.runs.prepare import Prepared
from sculpt.runs.space import AROUND, DiskUse, space_of
from sculpt.runs.start import resume, run
from sculpt.runs.state import Progress
from sculpt.storage.checkpoint import CheckpointError

TRAINING = {"steps": 5, "batch_size": 2, "lr": 1e-2}


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def disk_of(config: RunConfig) -> DiskUse:
    return space_of(Prepared(config).strategy)[1]


def bytes_of(folder: Path) -> int:
    """Of tensors in all checkpoints and models; what is linked counts once."""
    found = {p.stat().st_ino: p.stat().st_size for p in folder.rglob("*.safetensors")}
    return sum(found.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "plain"},
        {"method": BASELINES["osf"]},
        {"method": BASELINES["ewc"]},
        {"dtype": "bfloat16"},
        {"sculpt": {"engine": "update"}},
        {"sculpt": {"unfreeze_rank_ratio": 0.75, "coordinates": "full"}},
    ],
    ids=["sculpt", "plain", "osf", "ewc", "bfloat16", "update", "full"],
)
@pytest.mark.parametrize("keep", [1, 5])
def test_the_estimate_bounds_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], keep: int
) -> None:
    checkpoint = {"every_steps": 1, "keep": keep, "models": "each"}
    config = run_config(tmp_path, training=TRAINING, checkpoint=checkpoint, **changes)
    expected, most = disk_of(config), 0
    replace = os.replace

    def look(source: Any, target: Any) -> None:
        nonlocal most
        replace(source, target)
        most = max(most, bytes_of(config.out))

    monkeypatch.setattr(os, "replace", look)
    run(config)
    tensors = expected.checkpoints + expected.models
    names = 150_000  # headers of files, which are nothing beside real weights
    assert 0.4 * tensors - names < most <= tensors + names


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path, checkpoint={"keep": 2, "models": "each"})
    needed = disk_of(config).total
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(needed, 1, needed - 1))
    with pytest.raises(RunError, match=r"MB are free .* needed: .*keep=2.*models=each"):
        run(config)
    assert not config.out.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(needed, 0, needed))
    run(config)


def test_what_an_interrupted_run_has_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path, training=TRAINING)

    run_until(config, lambda now: now.phase == "train")
    left = disk_of(config).total - bytes_of(config.out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(left, 1, left - 1))
    with pytest.raises(RunError, match="are free on its disk"):
        resume(config.out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(left, 0, left))
    assert resume(config.out) is not None


def test_nothing_is_kept_where_nothing_is_asked_for(tmp_path: Path) -> None:
    disk = disk_of(run_config(tmp_path, checkpoint={"keep": 0, "models": "none"}))
    assert disk.total == AROUND


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_a_disk_that_fills_up_within_a_file_leaves_the_checkpoint_before(
    tmp_path: Path, phase: str
) -> None:
    """The system itself refuses to write beyond a limit, in the midst of a file."""
    config = run_config(tmp_path, training=TRAINING, checkpoint={"every_steps": 2})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(now: Progress) -> None:
        if (now.task, now.phase) == ("short", phase):
            resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, hard))

    try:
        with pytest.raises(CheckpointError, match=r"The one before is whole.*sculpt resume"):
            run(config, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert RunDirectory(config.out).status() == "failed"
    assert not list((config.out / "checkpoints").glob(".*"))
    assert resume(config.out) is not None
    run(config.model_copy(update={"out": tmp_path / "whole"}))
    assert fingerprint(config.out) == fingerprint(tmp_path / "whole")
