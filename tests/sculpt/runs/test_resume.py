"""A run that was killed ends with the bits of one that was not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from kills import fingerprint, left_alone, processes, until_finished
from tiny_runs import run_config, run_until, run_values

from bench.baselines import BASELINES
from sculpt.runs.config import RunConfig
from sculpt.runs.directory import RunError
from sculpt.runs.start import resume, run
from sculpt.runs.state import Progress

CHECKPOINT = {"every_steps": 2, "models": "each"}
TRAINING = {"steps": 3, "batch_size": 2, "lr": 1e-2, "dropout": True, "order": "bucketed"}


def ends_alike(config: RunConfig) -> None:
    """The run can be taken up, and ends as one that is left alone."""
    assert resume(config.out) is not None
    whole = config.out.with_name("whole")
    if not whole.exists():
        run(config.model_copy(update={"out": whole}))
    assert fingerprint(config.out) == fingerprint(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "plain"},
        {"method": BASELINES["lora"], "options": {"budget": "match"}},
        {"method": BASELINES["osf"]},
        {"method": BASELINES["olora"], "options": {"rank": 3}},
        {"method": "plain", "replay": {"rows": 2, "share": 0.5}},
        {"replay": {"rows": 2, "share": 0.5}},
        {"method": BASELINES["ewc"]},
        {"method": BASELINES["l2sp"]},
        {"method": BASELINES["frozen"]},
        {"method": "multitask"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "sculpt": {"weight_update": "recompute"}},
        {"sculpt": {"ranks": {"mrr": 0.1, "trr": 0.7}}, "calibration_rows": 3},
        {"sculpt": {"subspaces": "weights"}},
    ],
    ids=lambda changes: "-".join(filter(None, map(changes.get, ("method", "dtype")))) or "sculpt",
)
def test_stopped_in_every_phase_it_ends_with_the_same_bits(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    events: list[str] = []

    def config(out: str) -> RunConfig:
        sections = {"training": TRAINING, "checkpoint": CHECKPOINT, **changes}
        return run_config(tmp_path, out=str(tmp_path / out), **sections)

    run(config("whole"), lambda now: events.append(now.phase))
    # In each phase of both tasks: its first event and its last one.
    edges = [
        number
        for number, phase in enumerate(events, 1)
        if number == len(events) or phase != events[number] or phase != events[number - 2]
    ]
    for event in edges:
        run_until(config(f"at-{event}"), event)
        ends_alike(config(f"at-{event}"))


def test_no_subspace_is_searched_twice(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    run_until(config, 16)  # the second step; there are 14 matrices
    phases: list[tuple[str, str]] = []
    resume(config.out, lambda now: phases.append((now.task, now.phase)))
    assert ("very", "subspaces") not in phases
    assert phases[0] == ("very", "train")
    assert ("short", "subspaces") in phases


def test_a_run_without_any_checkpoint_begins_anew(tmp_path: Path) -> None:
    config = run_config(tmp_path, checkpoint={"keep": 0})
    run_until(config, 20)
    assert not (config.out / "checkpoints").exists()
    ends_alike(config)


def test_only_the_newest_checkpoints_are_kept_and_none_in_the_end(tmp_path: Path) -> None:
    config = run_config(tmp_path, checkpoint={"every_steps": 1, "keep": 2})
    counts = set()

    def count(now: Progress) -> None:
        folder = config.out / "checkpoints"
        counts.add(len(list(folder.iterdir())) if folder.is_dir() else 0)

    run(config, count)
    assert counts == {0, 1, 2}
    assert not (config.out / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "linked"),
    [({}, True), ({"dtype": "bfloat16"}, False), ({"method": "plain"}, False)],
    ids=["float32", "bfloat16", "plain"],
)
def test_weights_that_follow_are_written_once_for_a_task(
    tmp_path: Path, changes: dict[str, Any], linked: bool
) -> None:
    config = run_config(tmp_path, checkpoint={"every_steps": 1, "keep": 2}, **changes)
    run_until(config, lambda now: (now.phase, now.done) == ("train", 3))
    one, two = sorted((config.out / "checkpoints").iterdir())
    assert one.joinpath("model.safetensors").samefile(two / "model.safetensors") == linked
    assert not one.joinpath("random.safetensors").samefile(two / "random.safetensors")
    if linked:
        fixed = [next(folder.glob("method/task-*")) for folder in (one, two)]
        assert fixed[0].samefile(fixed[1])


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    run(config)
    before = fingerprint(config.out)
    assert resume(config.out) is None
    assert fingerprint(config.out) == before


def test_what_is_no_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such directory"):
        resume(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"is no run directory: it has no config\.json"):
        resume(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RunError, match="is not of a run"):
        resume(tmp_path)
    (tmp_path / "config.json").write_text('{"model_')
    with pytest.raises(RunError, match="is damaged"):
        resume(tmp_path)


def test_changed_data_are_noticed(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    run_until(config, 20)
    file = tmp_path / "short-train.jsonl"
    file.write_text(file.read_text().replace("money for people", "money for games"))
    with pytest.raises(RunError, match="the data have changed since the run began"):
        resume(config.out)


def test_killed_at_random_instants_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    server, rng = processes(), random.Random(7)
    config = run_values(tmp_path, training=TRAINING, checkpoint=CHECKPOINT)
    counts, seconds = left_alone(server, config)
    expected = fingerprint(tmp_path / "run")
    kills = 0
    for number in range(3):
        out = tmp_path / f"killed-{number}"
        struck = until_finished(server, config | {"out": str(out)}, rng, counts, seconds)
        assert fingerprint(out) == expected, struck
        kills += len(struck)
        if kills >= 3:
            break
