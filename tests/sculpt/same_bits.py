"""A list of runs whose bits must survive every change that is to change nothing.

    python -m tests.sculpt.same_bits           # digests of all runs, as JSON
    python -m tests.sculpt.same_bits --write   # notes them in same_bits.json

They hold for one processor, one version of torch and one thread, in a process of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tiny_runs import run_config
from torch import nn

from sculpt import SculptConfig, Sculptor
from sculpt.runs.start import resume, run
from sculpt_kernels import backends

NOTED = Path(__file__).with_name("same_bits.json")
ENGINES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "full coordinates": (torch.float32, {"coordinates": "full"}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, recomputed": (torch.bfloat16, {"weight_update": "recompute"}),
    "update": (torch.float32, {"engine": "update"}),
    "core": (torch.float32, {"constraint": "core"}),
    "core, bfloat16": (torch.bfloat16, {"constraint": "core"}),
}


def machine() -> str:
    """What digests depend on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = {
            key.strip(): value.strip()
            for key, _, value in (line.partition(":") for line in lines)
            if key.strip() in ("cpu family", "model", "stepping", "vendor_id")
        }
        model = " ".join(found.values()) or model
    native = "with" if backends()["native"] == "available" else "without"
    return f"torch {torch.__version__.split('+')[0]}, {model}, {native} native kernels"


def digest(value: Any) -> str:
    """Of nested values and tensors; the order of keys does not matter."""
    found = hashlib.sha256()

    def take(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            flat = item.detach().cpu().contiguous().view(-1)
            found.update(f"{item.dtype} {tuple(item.shape)}".encode())
            found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        elif isinstance(item, dict):
            for key in sorted(item):
                found.update(str(key).encode())
                take(item[key])
        elif isinstance(item, list | tuple):
            for part in item:
                take(part)
        else:
            found.update(repr(item).encode())

    take(value)
    return found.hexdigest()[:32]


def rows_of(certificate: Any) -> list[Any]:
    """The measures of a certificate that every version has."""
    names = ("name", "left", "right", "core", "floor", "change", "rounding")
    return [[row[name] for name in names] for row in certificate.to_dict()["rows"]]


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of safetensors files below `folder`, whatever the names of the files."""
    return {
        f"{file.parent.name.split('-')[0]}/{key}": value
        for file in sorted(folder.rglob("*.safetensors"))
        for key, value in load_file(file).items()
    }


def own_loop(folder: Path, engine: str) -> dict[str, Any]:
    """Two tasks; the first is saved, and taken up by another process's sculptor."""
    dtype, options = ENGINES[engine]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32, bias=False), nn.Linear(32, 12)
    ).to(dtype)
    x, y = (torch.randn(16, size).to(dtype) for size in (20, 12))
    found: dict[str, Any] = {}
    sculptor = Sculptor(model, SculptConfig(others="train", **options))
    for task in range(2):
        table = sculptor.begin_task(name=str(task))
        found[f"table {task}"] = [(row.name, row.preserved, row.energy) for row in table.rows]
        optimizer = torch.optim.AdamW(sculptor.parameters(), lr=1e-3, weight_decay=0.1)
        sculptor.attach(optimizer)
        for step in range(6):
            if task == 0 and step == 3:
                sculptor.save(folder / "task")
                weights = {n: v.clone() for n, v in model.state_dict().items()}
                state = optimizer.state_dict()
                sculptor.undo_task()
                model.load_state_dict(weights)
                sculptor = Sculptor.load(model, folder / "task")
                optimizer = torch.optim.AdamW(sculptor.parameters(), lr=1e-3, weight_decay=0.1)
                optimizer.load_state_dict(state)
                sculptor.attach(optimizer)
            loss = (model(x) - y).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(sculptor.parameters(), 0.1)
            optimizer.step()
            found[f"loss {task} {step}"] = loss
        found[f"certificate {task}"] = rows_of(sculptor.verify())
        found[f"independent {task}"] = rows_of(sculptor.verify(independent=True))
        sculptor.end_task()
    return found | {"saved": tensors_in(folder / "task"), "weights": model.state_dict()}


def trainer(folder: Path) -> dict[str, Any]:
    """A task in the Trainer, with its checkpoints."""
    from tests.sculpt.test_trainer import losses
    from tests.sculpt.test_trainer import trainer as make

    made, callback = make(folder, save_strategy="steps", save_steps=4)
    made.train()
    return {
        "losses": losses(made),
        "certificate": rows_of(callback.certificate),
        "checkpoint": tensors_in(folder / "checkpoint-4"),
        "weights": made.model.state_dict(),
    }


def sequence(folder: Path, subspaces: str) -> dict[str, Any]:
    """A task sequence that is stopped in its second task and resumed."""

    def stop(now: Any) -> None:
        if now.phase == "train" and now.task == "short" and now.done == 2:
            raise KeyboardInterrupt

    checkpoint = {"every_steps": 1, "keep": 1}
    config = run_config(folder, checkpoint=checkpoint, sculpt={"subspaces": subspaces})
    with contextlib.suppress(KeyboardInterrupt):
        run(config, stop)
    tensors = tensors_in(folder / "run" / "checkpoints")
    results = resume(folder / "run")
    found = results.methods["sculpt"]
    return {
        "losses": found.losses,
        "generated": found.generated,
        "among labels": found.among_labels,
        "certificates": [rows_of(c) for c in found.certificates],
        "checkpoint": tensors,
        "weights": tensors_in(folder / "run" / "model"),
    }


def divided_task(folder: str) -> dict[str, Any]:
    from distributed.tasks import batch, network, share
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model[0])
    fully_shard(model)
    sculptor = Sculptor(model, SculptConfig())
    sculptor.begin_task()
    optimizer = torch.optim.AdamW(sculptor.parameters(), lr=3e-3)
    sculptor.attach(optimizer)
    losses = []
    for step in range(4):
        x, y = (share(part) for part in batch(0, step))
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    sculptor.save(Path(folder) / "shards")
    certificate = rows_of(sculptor.verify())
    sculptor.end_task()
    weights = {name: value.full_tensor() for name, value in model.state_dict().items()}
    return {"losses": losses, "certificate": certificate, "weights": weights}


def divided(folder: Path) -> dict[str, Any]:
    """Two processes, each with half of every matrix."""
    from distributed.launch import launch

    ranks = launch(2, divided_task, folder, str(folder))
    return {"ranks": ranks, "saved": tensors_in(folder / "shards")}


RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{f"own loop, {e}": lambda folder, e=e: own_loop(folder, e) for e in ENGINES},
    "trainer": trainer,
    **{f"sequence, {s}": lambda folder, s=s: sequence(folder, s) for s in ("auto", "weights")},
    "divided": divided,
}


def digests(name: str, folder: Path) -> dict[str, str]:
    folder.mkdir()
    # Checkpoints hold the state of every generator.
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    return {key: digest(value) for key, value in RUNS[name](folder).items()}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        found = {name: digests(name, Path(folder) / str(i)) for i, name in enumerate(RUNS)}
    if "--write" in sys.argv:
        noted = json.loads(NOTED.read_text(encoding="utf-8")) if NOTED.is_file() else {}
        noted[machine()] = found
        NOTED.write_text(json.dumps(noted, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps({"machine": machine(), "runs": found}))


if __name__ == "__main__":
    main()
