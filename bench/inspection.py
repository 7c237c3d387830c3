"""What `sculpt inspect` predicts, against real steps of real models.

    python -m bench.inspection                                # both models, every way to train them
    python -m bench.inspection --models all-MiniLM-L6-v2 --ways plain "sculpt 1/4"

Each way trains in a process of its own, on the CPU. Tensors are counted by what is alive, what a
pass keeps and its peak by the allocations themselves, FLOPs by torch's counter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.memory import peak, tensor_bytes
from bench.training import about, give_back_freed_memory
from sculpt import SculptConfig, Sculptor
from sculpt.demo.models import MINILM, SMOLLM2, minilm, smollm2
from sculpt.inspection import inspect_model
from sculpt.inspection.result import Inspection
from sculpt.inspection.trace import ATTENTION
from sculpt.memory import optimizer_state_bytes, peak_memory_bytes, reset_peak_memory
from sculpt.storage.files import write_json
from sculpt.task.targets import find_targets

MODELS: dict[str, Callable[[], Path]] = {MINILM: minilm, SMOLLM2: smollm2}
NAME = "inspection.json"


@dataclass(frozen=True)
class Layout:
    """The tokens of a step, and whether its layers are recomputed."""

    sequences: int
    length: int
    checkpointing: bool = False

    def __str__(self) -> str:
        return f"{self.sequences} x {self.length}" + " recomputed" * self.checkpointing


LAYOUTS = (Layout(2, 128), Layout(1, 512), Layout(1, 512, True))


@dataclass(frozen=True)
class Way:
    """A method, the options of `SculptConfig`, and the dtype of the weights."""

    method: str
    options: dict[str, Any]
    dtype: str = "float32"

    @property
    def config(self) -> SculptConfig:
        return SculptConfig(**{"unfreeze_rank_ratio": 0.25} | self.options)


WAYS = {
    "plain": Way("plain", {}),
    "plain, others too": Way("plain", {"others": "train"}),
    "plain, bfloat16": Way("plain", {}, "bfloat16"),
    "sculpt 1/2": Way("sculpt", {"unfreeze_rank_ratio": 0.5}),
    "sculpt 1/4": Way("sculpt", {}),
    "sculpt 1/8": Way("sculpt", {"unfreeze_rank_ratio": 0.125}),
    "sculpt, full coordinates": Way("sculpt", {"coordinates": "full"}),
    "sculpt, others too": Way("sculpt", {"others": "train"}),
    "sculpt, originals on disk": Way("sculpt", {"originals": "disk"}),
    "sculpt, originals on the host": Way("sculpt", {"originals": "cpu"}),
    "sculpt, update": Way("sculpt", {"engine": "update"}),
    "sculpt, update, core": Way("sculpt", {"constraint": "core"}),
    "sculpt, gradient": Way("sculpt", {"engine": "gradient"}),
    "sculpt, bfloat16": Way("sculpt", {}, "bfloat16"),
    "sculpt, bfloat16, recompute": Way("sculpt", {"weight_update": "recompute"}, "bfloat16"),
    "sculpt, bfloat16, update": Way("sculpt", {"engine": "update"}, "bfloat16"),
}


class Trained:
    """A real model, ready to be trained in one way.

    Attributes:
        weights, beside: bytes of its parameters, and of what the way added to them.
    """

    def __init__(self, folder: Path, way: Way) -> None:
        from transformers import AutoModel, AutoModelForCausalLM

        kind = AutoModelForCausalLM if folder.name == SMOLLM2 else AutoModel
        model = kind.from_pretrained(folder, dtype=getattr(torch, way.dtype)).train()
        self.model: nn.Module = model
        self.weights = _bytes(model.parameters())
        loaded = tensor_bytes()
        self._sculptor: Sculptor | None = None
        self.parameters = self._prepare(way)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        if self._sculptor is not None:
            self._sculptor.attach(self.optimizer)
        self.beside = tensor_bytes() - loaded

    def _prepare(self, way: Way) -> list[nn.Parameter]:
        if way.method == "sculpt":
            self._sculptor = Sculptor(self.model, way.config)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._sculptor.begin_task()
            return self._sculptor.parameters()
        self.model.requires_grad_(way.config.others == "train")
        for target in find_targets(self.model, way.config).chosen:
            target.parameter.requires_grad_(True)
        return [p for p in self.model.parameters() if p.requires_grad]

    def loss(self, layout: Layout) -> Callable[[], Tensor]:
        """What a step minimises: of language if the model is one, or anything at all."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        ids = torch.randint(vocabulary, (layout.sequences, layout.length), generator=generator)
        inputs: dict[str, Any] = {"input_ids": ids}
        language = self.model.get_output_embeddings() is not None  # type: ignore[operator]
        if language:
            inputs |= {"labels": ids, "use_cache": False}

        def loss() -> Tensor:
            out = self.model(**inputs)
            value: Tensor = out.loss if language else out[0].float().square().mean()
            return value

        return loss

    def recompute(self, on: bool) -> None:
        if on:
            self.model.activation_checkpointing_enable()  # type: ignore[operator]
        else:
            self.model.activation_checkpointing_disable()  # type: ignore[operator]


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _addmm_flops(total: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    """The product in place, which the counter does not know."""
    return int(2 * left[0] * left[1] * right[1])


COUNTED = ATTENTION | {torch.ops.aten.addmm_: _addmm_flops}


def measured(trained: Trained, layout: Layout) -> dict[str, int]:
    """One step, after one that makes the states of the optimizer."""
    trained.recompute(layout.checkpointing)
    loss = trained.loss(layout)
    loss().backward()  # type: ignore[no-untyped-call]
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    values: list[Tensor] = []
    forward = peak(lambda: values.append(loss()))
    backward = peak(lambda: values.pop().backward())  # type: ignore[no-untyped-call]
    gradients = sum(p.grad.nbytes for p in trained.parameters if p.grad is not None)
    step = peak(trained.optimizer.step)
    trained.optimizer.zero_grad()
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        loss().backward()  # type: ignore[no-untyped-call]
        trained.optimizer.step()
    trained.optimizer.zero_grad()
    states = optimizer_state_bytes(trained.optimizer)
    held = trained.weights + trained.beside + states
    passed = max(forward.total, forward.left + backward.total)
    return {
        "gradients": gradients,
        "optimizer": states,
        "activations": forward.left,
        "peak": held + passed,
        "step_peak": held + max(passed, gradients + step.total),
        "flops": counter.get_total_flops(),
    }


def predicted(folder: Path, way: Way, layout: Layout) -> Inspection:
    return inspect_model(
        folder,
        way.config,
        tokens=layout.sequences * layout.length,
        sequence=layout.length,
        dtype=way.dtype,
        checkpointing=layout.checkpointing,
        state_dtype="trained",
        read_spectra=False,
    )


def compare(
    folder: Path, way: Way, trained: Trained, layouts: Iterable[Layout]
) -> dict[str, dict[str, Any]]:
    """Predicted and measured, in bytes and FLOPs, of each layout."""
    found = {}
    for layout in layouts:
        method = predicted(folder, way, layout).methods[way.method]
        cost = method.cost
        # Here the host is the device.
        on_host = cost.host if way.options.get("originals") != "disk" else 0
        expected = {
            "weights": cost.weights,
            "beside": cost.bases + cost.factors + cost.copies + on_host,
            "gradients": cost.gradients,
            "optimizer": cost.optimizer,
            "activations": method.activations,
            "peak": (method.peak or 0) + on_host,
            "flops": method.flops,
        }
        real = {"weights": trained.weights, "beside": trained.beside} | measured(trained, layout)
        found[str(layout)] = {"predicted": expected, "measured": real}
    return found


def one(name: str, way: Way) -> dict[str, Any]:
    """All that is measured of one way, in this process."""
    folder = MODELS[name]()
    give_back_freed_memory()
    reset_peak_memory()
    base = peak_memory_bytes()
    trained = Trained(folder, way)
    give_back_freed_memory()
    reset_peak_memory()
    loss = trained.loss(LAYOUTS[1])
    for _ in range(3):
        loss().backward()  # type: ignore[no-untyped-call]
        trained.optimizer.step()
        trained.optimizer.zero_grad()
    process = peak_memory_bytes() - base
    return {"process": process, "layouts": compare(folder, way, trained, LAYOUTS)}


COLUMNS = ("weights", "beside", "gradients", "optimizer", "activations", "peak", "flops")


def table(name: str, content: dict[str, Any]) -> str:
    """Markdown: predicted over measured, one line for each model and way."""
    layouts = list(map(str, LAYOUTS))
    lines = [
        f"### Predictions of `sculpt inspect`, `results/{name}`",
        "",
        f"Predicted over measured on real steps ({content['cpu']}, torch {content['torch']}, peft "
        f"{content['peft']}, {content['date']}, `{content['command']}`), largest difference "
        f"{worst(content['rows']):.1%}. Activations, peak and FLOPs with "
        f"{', '.join(layouts)}. The last two columns are no predictions: the tensors of the whole "
        "step, the optimizer and the update of the weights included, and the growth of the "
        f"process, both over the predicted peak with {layouts[1]}.",
        "",
        f"| model | way | {' | '.join(COLUMNS)} | whole step | process |",
        "|---" * 2 + "|---:" * (len(COLUMNS) + 2) + "|",
    ]
    for row in content["rows"]:
        cells = [_cell(list(_ratios(row, column))) for column in COLUMNS]
        default = row["layouts"][layouts[1]]
        beyond = default["measured"]["step_peak"], row["process"]
        cells += [f"{found / default['predicted']['peak']:.2f}" for found in beyond]
        lines.append(f"| {row['model']} | {row['way']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratios(row: dict[str, Any], column: str) -> Iterator[float]:
    for layout in row["layouts"].values():
        expected, found = layout["predicted"][column], layout["measured"][column]
        yield expected / found if found else 1.0 + bool(expected)


def _cell(ratios: list[float]) -> str:
    texts = [f"{ratio:.3f}" for ratio in ratios]
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)


def worst(rows: list[dict[str, Any]]) -> float:
    """The largest relative difference of a prediction."""
    return max(abs(r - 1) for row in rows for column in COLUMNS for r in _ratios(row, column))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(one(options.models[0], WAYS[options.ways[0]])))
        return
    path = options.out / NAME
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    # What is freed is given back, so that the process shows what is used.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    for model in options.models:
        for way in options.ways:
            command = [sys.executable, "-m", "bench.inspection", "--one", "--models", model]
            done = subprocess.run(
                [*command, "--ways", way], check=True, stdout=subprocess.PIPE, text=True,
                env=environment,
            )  # fmt: skip
            row = {"model": model, "way": way} | json.loads(done.stdout.splitlines()[-1])
            rows = [old for old in rows if (old["model"], old["way"]) != (model, way)] + [row]
            rows.sort(
                key=lambda row: (list(MODELS).index(row["model"]), list(WAYS).index(row["way"]))
            )
            print(f"{model}, {way}: off by at most {worst([row]):.1%}", flush=True)
            facts = {"command": "python -m bench.inspection", "rows": rows}
            write_json(path, about() | facts)
    print(table(path.name, json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
