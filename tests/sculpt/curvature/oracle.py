"""Sums over rows by hand: one row after the other, without padding, gradients by autograd."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sculpt import SculptConfig
from sculpt.curvature.collect import collect
from sculpt.curvature.factors import Factor
from sculpt.curvature.memory import Memory
from sculpt.distributed.processes import Processes
from sculpt.task.targets import find_targets

UNIT = 2.0**-24
IGNORED = -100


def collected(
    model: nn.Module, batches: Any, known: Memory | None = None, **options: Any
) -> Memory:
    """What `collect` makes of batches; options are those of the configuration."""
    config = SculptConfig(**options)
    targets = find_targets(model, config).chosen
    processes = Processes(None, torch.device("cpu"))
    return collect(model, targets, batches, known or Memory(), config, processes, "rows")


def assert_sums(factor: Factor, X: Tensor, at: int | None = None) -> None:
    """`factor` is `Σ x xᵀ` of the rows of `X`, as far as float32 sums of float32 vectors can be.

    Each element is a sum of `N` products, of factors that were rounded once: `(N + 3) u` of the sum
    of sizes, whatever the order; two more for what is in between.
    """
    total = (factor.total if at is None else factor.total[at]).double()
    X = X.double()
    exact, sizes = X.mT @ X, X.abs().mT @ X.abs()
    if factor.kind == "diagonal":
        exact, sizes = exact.diagonal(), sizes.diagonal()
    # Rows in batches and rows alone differ in float64 as well, by far less.
    limit = (len(X) + 5) * UNIT * sizes + 1e-13 * sizes.max()
    assert ((total - exact).abs() <= limit).all(), float(((total - exact).abs() / limit).max())
    count = factor.count if at is None else factor.count[at]
    assert int(count) == len(X)


def in_float64(model: nn.Module) -> nn.Module:
    """Without the steps that transformers takes in float32 in any model."""
    for path, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon, dtype=torch.float64)
            model.set_submodule(path, norm)
        if type(module).__name__ == "MixtralTopKRouter":
            module.forward = partial(_route, module)
    return model


def _route(router: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = F.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
    shares, chosen = logits.softmax(-1).topk(router.top_k, dim=-1)
    return logits, shares / shares.sum(-1, keepdim=True), chosen


class Rows:
    """Rows of tokens with labels, alone and as padded batches.

    Args:
        sizes: of the rows; the second token is not learned, and the first is never predicted.
        answers: sizes of the answers of an encoder-decoder.
    """

    def __init__(self, sizes: Sequence[int] = (7, 4, 6), answers: Sequence[int] = ()) -> None:
        g = torch.Generator().manual_seed(0)
        self.ids = [torch.randint(2, 40, (size,), generator=g) for size in sizes]
        self.labels = [ids.clone().index_fill_(0, torch.tensor(1), IGNORED) for ids in self.ids]
        if answers:
            self.labels = [torch.randint(2, 40, (size,), generator=g) for size in answers]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, *rows: int) -> dict[str, Tensor]:
        rows = rows or tuple(range(len(self)))
        ids = nn.utils.rnn.pad_sequence([self.ids[i] for i in rows], True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(self.ids[i]) for i in rows], True)
        labels = nn.utils.rnn.pad_sequence([self.labels[i] for i in rows], True, IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def loss(self, model: nn.Module, row: int) -> Tensor:
        """The summed log-likelihood of one row, negative."""
        labels = self.labels[row]
        encoder_decoder = model.config.is_encoder_decoder
        inputs = {"labels": labels[None]} if encoder_decoder else {}
        logits = model(input_ids=self.ids[row][None], use_cache=False, **inputs).logits[0]
        if not encoder_decoder:
            logits, labels = logits[:-1], labels[1:]
        return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)


def by_hand(
    model: nn.Module, names: Sequence[str], losses: Sequence[Callable[[], Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """All that layers read, and the gradients at their outputs, `(N, n)` and `(N, m)`.

    Rows of the identity for what a layer looks up.
    """
    read: dict[str, list[Tensor]] = defaultdict(list)
    said: dict[str, list[Tensor]] = defaultdict(list)

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            x = args[0].detach()
            x = x if x.is_floating_point() else F.one_hot(x, module.num_embeddings).double()
            read[name].append(x.flatten(0, -2))
            output.retain_grad()
            outputs.append((name, output))

        return note

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    for loss in losses:
        outputs: list[tuple[str, Tensor]] = []
        model.zero_grad()
        loss().backward()
        for name, output in outputs:
            said[name].append(output.grad.flatten(0, -2))
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {name: (torch.cat(read[name]), torch.cat(said[name])) for name in names}
