"""Which measure of importance predicts the layers whose trailing directions may be freed?

For every matrix of SmolLM2-135M-Instruct: each measure of `AdaptiveRanks`, and the loss increase
when its trailing part is perturbed at random, by as much as a step of AdamW would move it (the same
root mean square for every matrix), averaged over both signs, which leaves the second order. The
loss is that of next tokens on news texts; the measures see other texts than the loss.

    python -m bench.importance --out bench/results     # every matrix: half an hour on two cores
    python -m bench.importance --every 3 --below 13 --calibration 8 --texts 8 --tokens 32
    python -m bench.importance --time --out bench/results   # add how long the pass takes
    python -m bench.importance --plot                  # docs/images/importance.png from the file
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sculpt.adaptive.importance import from_data, from_weights
from sculpt.config import SculptConfig
from sculpt.demo.models import smollm2
from sculpt.demo.tasks import demo_tasks
from sculpt.distributed.processes import Processes
from sculpt.storage.files import write_json
from sculpt.task.targets import Target, find_targets
from sculpt_kernels import expand_add_, split

FILE = "importance-SmolLM2-135M.json"
MEASURES = ("cosine", "fisher", "captured_energy", "effective_rank")
CPU = torch.device("cpu")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--calibration", type=int, default=32, help="texts that measures see")
    parser.add_argument("--texts", type=int, default=16, help="texts of the loss")
    parser.add_argument("--tokens", type=int, default=48, help="of each text")
    parser.add_argument("--size", type=float, default=0.3, help="of the perturbation over rms(W)")
    parser.add_argument("--every", type=int, default=1, help="measure one in so many blocks")
    parser.add_argument("--below", type=int, default=1000, help="only blocks before this one")
    parser.add_argument("--time", action="store_true", help="only the time of the pass")
    parser.add_argument("--plot", action="store_true", help="only the picture")
    options = parser.parse_args(arguments)
    path = options.out / FILE
    if options.plot:
        plot(json.loads(path.read_text(encoding="utf-8")), Path("docs/images/importance.png"))
        return 0
    model, texts = load(options.calibration + options.texts, options.tokens)
    targets = find_targets(model, SculptConfig(effective_rank=0.8)).chosen
    blocks = range(0, options.below, options.every)
    targets = [target for target in targets if _block(target.name) in blocks]
    if options.time:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["time"] = pass_time(model, targets, texts)
        write_json(path, content)
        return 0
    start = time.perf_counter()
    rows = measure(model, targets, texts, options)
    timed = pass_time(model, targets, texts)
    content = {
        "model": "SmolLM2-135M-Instruct",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - start),
        "settings": {k: v for k, v in vars(options).items() if isinstance(v, int | float)},
        "time": timed,
        "rows": rows,
    }
    write_json(path, content)
    print(table(FILE, content))
    return 0


def _block(name: str) -> int:
    return int(name.split(".")[2])


def load(count: int, tokens: int) -> tuple[Any, Tensor]:
    """The model, and `count` news texts of exactly `tokens` tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    news = demo_tasks(0, train_per_task=600, test_per_task=60)[0].train
    ids = (tokenizer(example.text)["input_ids"] for example in news)
    return model, torch.tensor([row[:tokens] for row in ids if len(row) >= tokens][:count])


def next_tokens(ids: Tensor, model: Any) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


@torch.no_grad()
def measure(model: Any, targets: list[Target], texts: Tensor, options: Any) -> list[dict[str, Any]]:
    calibration = [partial(next_tokens, row[None]) for row in texts[: options.calibration]]
    found = {}
    for kind in MEASURES:
        if kind in ("cosine", "fisher"):
            preserved = [target.preserved for target in targets]
            with torch.enable_grad():
                found[kind] = from_data(
                    model, targets, kind, preserved, calibration, Processes(None, CPU)
                )
        else:
            found[kind] = from_weights(targets, kind, Processes(None, CPU))
    held_out = texts[options.calibration :]
    before = float(next_tokens(held_out, model))
    sizes = [float(t.parameter.square().mean().sqrt()) for t in targets]
    rms = options.size * statistics.median(sizes)
    rows = []
    generator = torch.Generator().manual_seed(0)
    for target in targets:
        W = target.parameter
        low = split(W.double(), rank=target.preserved)
        U, V = low.U.float(), low.V.float()
        C = torch.randn(U.shape[1], U.shape[1], generator=generator)
        C *= rms * W.numel() ** 0.5 / C.norm()
        kept, losses = W.clone(), []
        for sign in (1.0, -1.0):
            expand_add_(W, C, U, V, alpha=sign)
            losses.append(float(next_tokens(held_out, model)))
            W.copy_(kept)
        increase = sum(losses) / 2 - before
        values = {kind: found[kind][target.name].value for kind in MEASURES}
        rows.append({"name": target.name, **values, "loss_increase": increase})
        print(f"{target.name}: {increase:+.5f}", flush=True)
    return rows


def pass_time(model: Any, targets: list[Target], texts: Tensor) -> dict[str, Any]:
    """Medians of rounds in which the plain forward pass and those that measure take turns.

    That by Fisher begins with the subspaces of every matrix, which are counted on their own.
    """
    batches = [partial(next_tokens, texts[i : i + 8]) for i in range(0, len(texts), 8)]
    preserved = [target.preserved for target in targets]
    seconds: dict[str, list[float]] = {}

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                batch(model)

    def subspaces() -> None:
        for target in targets:
            split(target.oriented(target.parameter.detach()), rank=target.preserved)

    def measured(kind: str) -> None:
        from_data(model, targets, kind, preserved, batches, Processes(None, CPU))

    parts = {
        "forward": plain,
        "cosine": partial(measured, "cosine"),
        "subspaces": subspaces,
        "fisher": partial(measured, "fisher"),
    }
    for _ in range(3):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    forward = seconds["forward"]
    fisher = [f - s for f, s in zip(seconds["fisher"], seconds["subspaces"], strict=True)]
    ratios = {
        name: statistics.median(m / p for m, p in zip(measured_seconds, forward, strict=True))
        for name, measured_seconds in (("cosine", seconds["cosine"]), ("fisher", fisher))
    }
    return {
        "date": date.today().isoformat(),
        "tokens": texts.numel(),
        "matrices": len(targets),
        "threads": torch.get_num_threads(),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": ratios,
    }


def spearman(a: list[float], b: list[float]) -> float:
    """Correlation of the ranks of two lists; equal values share their mean rank."""
    ranks = []
    for values in (a, b):
        _, places, counts = (
            torch.tensor(values).double().unique(return_inverse=True, return_counts=True)
        )
        ranks.append((counts.cumsum(0) - (counts - 1) / 2)[places])
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def interval(rows: list[dict[str, Any]], kind: str, truth: str) -> tuple[float, float]:
    """In which 95 % of the correlations lie when as many matrices are drawn again and again."""
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(1000):
        drawn = torch.randint(len(rows), (len(rows),), generator=generator).tolist()
        draws.append(spearman([rows[i][kind] for i in drawn], [rows[i][truth] for i in drawn]))
    draws.sort()
    return draws[25], draws[974]


def correlations(rows: list[dict[str, Any]], kind: str, truth: str) -> tuple[float, float]:
    """Over all matrices, and the mean over kinds of matrices of that among a kind's layers."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["name"].rpartition(".")[2], []).append(row)
    within = [
        spearman([r[kind] for r in group], [r[truth] for r in group]) for group in groups.values()
    ]
    everywhere = spearman([r[kind] for r in rows], [r[truth] for r in rows])
    return everywhere, statistics.fmean(within)


def table(name: str, content: dict[str, Any]) -> str:
    rows = content["rows"]
    settings = content["settings"]
    harmless = sum(row["loss_increase"] <= 0 for row in rows)
    clipped = sum(row["cosine"] == 0 for row in rows)
    lines = [
        f"### What predicts the layers that may be freed, `results/{name}`",
        "",
        f"{content['model']}, {len(rows)} matrices (of one in {settings['every']} "
        f"blocks), {settings['calibration']} texts for the measures and "
        f"{settings['texts']} for the loss, of {settings['tokens']} tokens; "
        f"{content['date']}, torch {content['torch']}, "
        f"{content['seconds']} s. Spearman's rank correlation, over all matrices and (mean over "
        f"the kinds of matrices) among the layers of one kind; a good measure has a large positive "
        "one. The interval is a bootstrap over matrices. "
        f"{harmless} matrices had no loss increase; the cosine of {clipped} is 0 or below.",
        "",
        "| measure | with the loss increase | 95 % | of one kind | with Fisher | of one kind |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for kind in MEASURES:
        everywhere, *cells = (
            f"{value:+.2f}"
            for truth in ("loss_increase", "fisher")
            for value in correlations(rows, kind, truth)
        )
        between = " to ".join(f"{end:+.2f}" for end in interval(rows, kind, "loss_increase"))
        lines.append(f"| {kind} | {everywhere} | {between} | " + " | ".join(cells) + " |")
    if "time" in content:
        about = content["time"]
        lines += [
            "",
            f"Of a plain forward pass ({about['seconds']['forward']:.2f} s for {about['tokens']} "
            f"tokens, {about['threads']} threads) the pass by cosine takes "
            f"{about['ratio']['cosine']:.2f}, and that by Fisher {about['ratio']['fisher']:.2f}, "
            f"forward and backward, after {about['seconds']['subspaces']:.2f} s for the subspaces "
            f"of {about['matrices']} matrices.",
        ]
    return "\n".join(lines)


def plot(content: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in content["rows"] if row["loss_increase"] > 0]
    kinds = list(dict.fromkeys(row["name"].rpartition(".")[2] for row in rows))
    figure = Figure(figsize=(13, 3.9), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    figure.subplots_adjust(left=0.06, right=0.9, top=0.8, bottom=0.14, wspace=0.08)
    for axis, measure_name in zip(axes, MEASURES, strict=True):
        for number, kind in enumerate(kinds):
            of_kind = [row for row in rows if row["name"].endswith(kind)]
            x = [row[measure_name] for row in of_kind]
            y = [row["loss_increase"] for row in of_kind]
            axis.scatter(x, y, s=14, color=f"C{number}", label=kind, alpha=0.8, linewidths=0)
        axis.set_yscale("log")
        if measure_name == "fisher":
            axis.set_xscale("log")
        everywhere, within = correlations(content["rows"], measure_name, "loss_increase")
        axis.set_title(f"{measure_name}\nρ {everywhere:+.2f}, of one kind {within:+.2f}",
                       fontsize=10, loc="left")  # fmt: skip
        axis.set_xlabel("importance", fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("loss increase", fontsize=9)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    title = "Loss increase when the trailing fifth of one matrix is perturbed"
    figure.text(0.012, 0.93, title, fontsize=13, fontweight="bold")
    figure.savefig(path)


if __name__ == "__main__":
    raise SystemExit(main())
