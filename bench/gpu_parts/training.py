"""Training steps of a model in the LLaMA-2-7B configuration: random weights, bf16, checkpointing.

Plain full fine-tuning keeps its Adam moments in bf16, because float32 ones do not fit beside it.
LoRA and OSF are stand-ins with PEFT's arithmetic and tensors; OSF's goes without its projections of
gradients, in its favour. Bases are random: a step takes the same time.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bench.gpu_parts.run import Run
from bench.llama import LLAMA_2_7B, TINY, Llama, Shape, matrix_flops
from sculpt_kernels import Subspace, orthonormalize

if TYPE_CHECKING:
    from bench.contenders import Contender

METHODS = (
    ("plain", 1.0),
    ("sculpt", 0.25),
    ("sculpt", 0.125),
    ("lora", 0.0),
    ("osf", 0.125),
    ("sculpt", 0.5),
    ("osf", 0.25),
)
RANK = 32
LENGTH = 4096
# Seconds that must be left for one method: building it, and six steps of so many tokens.
NEEDED = {16384: 26.0, 4096: 14.0}


def part_training(run: Run) -> None:
    """Each method with each number of tokens: the larger ones first, which say more."""
    shape = TINY if run.options.tiny else LLAMA_2_7B
    for method, ratio in METHODS:
        for tokens in (64,) if run.options.tiny else (16384, 4096):
            case = f"training {method} {ratio:g} {tokens}"
            seconds = 2.0 if run.options.tiny else NEEDED[tokens]
            run.attempt(case, seconds, _measure, run, method, ratio, shape, tokens)


def _measure(run: Run, method: str, ratio: float, shape: Shape, tokens: int) -> None:
    cuda = run.device.type == "cuda"
    contender = _contender(run.device, method, ratio, shape)
    ids = torch.randint(shape.vocabulary, (max(1, tokens // LENGTH), min(tokens, LENGTH)),
                        device=run.device)  # fmt: skip
    state = torch.cuda.memory_allocated() if cuda else None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    skip, steps = (1, 2) if run.options.tiny else (2, 6)
    for _ in range(steps):
        contender.step(ids)
    phases = contender.seconds(skip=skip)
    each = zip(*(times[skip:] for times in contender.phases.values()), strict=True)
    seconds = statistics.median(map(sum, each))
    work = matrix_flops(shape, tokens, ids.shape[1])
    rate = run.rates.get("bfloat16", run.rates["float32"])
    row = {
        "method": method,
        "ratio": ratio,
        "tokens": tokens,
        "seconds": seconds,
        "phases": phases,
        "tokens_per_second": tokens / seconds,
        # FLOPs that plain training needs, by the measured rate of large products.
        "utilisation": work / seconds / rate,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        # Weights and bases before the first step; gradients and optimizer states come with it.
        "held_bytes": state,
        "trainable": contender.trainable,
        "optimizer_bytes": contender.optimizer_bytes,
    }
    run.results["training"].append(row)
    print(line(row), flush=True)


def _contender(device: torch.device, method: str, ratio: float, shape: Shape) -> Contender:
    # Here, so that the script runs where these need what is not installed.
    from bench.contenders import Contender
    from bench.peers import LoraLayer, OsfLayer
    from sculpt import SculptConfig, Sculptor

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = Llama(shape, checkpointing=True)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(method == "sculpt")
    sculptor = None
    if method == "sculpt":
        sculptor = Sculptor(model, SculptConfig(unfreeze_rank_ratio=ratio, basis_dtype="weight"))
        given = {name: _random(module, ratio) for name, module in model.matrices().items()}
        sculptor.begin_task(subspaces=given)
        trained: list[nn.Parameter] = sculptor.parameters()
    elif method == "plain":
        trained = [module.weight for module in model.matrices().values()]
        for weight in trained:
            weight.requires_grad_(True)
    else:
        for name, module in model.matrices().items():
            m, n = module.weight.shape
            rank = min(RANK, m, n) if method == "lora" else int(ratio * min(m, n))
            kind = LoraLayer if method == "lora" else OsfLayer
            with device:
                layer = kind(module, (m, n), rank)
            if isinstance(layer, OsfLayer):
                for parameter in layer.parameters(recurse=False):
                    nn.init.normal_(parameter, std=0.01)
                for start, now in zip(layer.start, (layer.U, layer.S, layer.V), strict=True):
                    start.copy_(now.detach())
            else:
                nn.init.zeros_(layer.B.weight)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    return Contender(method, model, optimizer, _no_delta, sculptor)


def _no_delta(name: str) -> torch.Tensor:
    raise NotImplementedError(f"the update of {name} is not measured here")


def _random(module: nn.Linear, ratio: float) -> Subspace:
    weight = module.weight
    rank = min(weight.shape) - int((1 - ratio) * min(weight.shape))
    U, V = (
        orthonormalize(torch.randn(size, rank, device=weight.device)).to(weight.dtype)
        for size in weight.shape
    )
    return Subspace(U, V, min(weight.shape) - rank, "low", 1.0, "random")


def line(row: dict[str, Any]) -> str:
    peak = f"{row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] else ""
    phases = " ".join(f"{name} {seconds:.3f}" for name, seconds in row["phases"].items())
    return (
        f"{row['method']:7} {row['ratio']:<6g} {row['tokens']:6} tokens {row['seconds']:8.3f} s "
        f"{row['tokens_per_second']:8.0f} tokens/s {row['utilisation']:5.0%}  {phases}  {peak}"
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines for the end of the script: seconds against those of plain."""
    plain = {row["tokens"]: row["seconds"] for row in rows if row["method"] == "plain"}
    return [
        f"{line(row)}  {row['seconds'] / plain[row['tokens']]:.2f}x"
        if row["tokens"] in plain
        else line(row)
        for row in rows
    ]
