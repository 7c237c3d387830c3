"""A Llama in plain torch, so that training can be measured on a bare machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `heads` query heads share `kv_heads` of keys and values."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Of the linear layers of one layer, out x in."""
        d, kv = self.width, self.width * self.kv_heads // self.heads
        return [(d, d), (kv, d), (kv, d), (d, d), *[(self.inner, d)] * 2, (d, self.inner)]


def two_layers(width: int) -> Shape:
    """Llama's proportions (11008 to 4096), heads of 64, a vocabulary that hardly counts."""
    inner = 64 * round(width * 11008 / 4096 / 64)
    return Shape(width, inner, 2, width // 64, width // 64, 256)


SMOLLM2_135M = Shape(576, 1536, 30, 9, 3, 49152, tied=True)
LLAMA_2_7B = Shape(4096, 11008, 32, 32, 32, 32000)
TINY = Shape(64, 96, 2, 4, 2, 128)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.size = shape.width // shape.heads
        self.q_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.k_proj = nn.Linear(shape.width, shape.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(shape.width, shape.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2)  # [B, H, T, D]
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (z * cos + _turned(z) * sin for z in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        result: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return result


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.gate_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.width, bias=False)
        self.before_attention = nn.RMSNorm(shape.width)
        self.before_inner = nn.RMSNorm(shape.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x), cos, sin)
        y = self.before_inner(x)
        result: Tensor = x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return result


class Llama(nn.Module):
    """Next-token loss of a batch of token ids; only the matrices inside the layers train."""

    def __init__(self, shape: Shape, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.checkpointing = checkpointing
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.lm_head.weight = self.embedding.weight
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def matrices(self) -> dict[str, nn.Linear]:
        """What trains: the linear layers but for the head."""
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear) and module is not self.lm_head
        }

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        cos, sin = self._angles(ids.shape[1], x)
        for layer in self.layers:
            if self.checkpointing:
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin)
        logits = self.lm_head(self.norm(x))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def _angles(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        size = self.shape.width // self.shape.heads
        rates = 1e4 ** -(torch.arange(0, size, 2, device=like.device) / size)
        angles = torch.outer(torch.arange(length, device=like.device).float(), rates).repeat(1, 2)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def matrix_flops(shape: Shape, tokens: int, length: int) -> float:
    """FLOPs of a plain training step without recomputing: `6 x` weights, head, and attention."""
    weights = shape.layers * sum(m * n for m, n in shape.matrices)
    # A frozen head has no weight gradient; causal attention needs half of the square.
    head = 4 * tokens * shape.width * shape.vocabulary
    attention = 6 * shape.layers * tokens * length * shape.width
    return 6.0 * tokens * weights + head + attention


def step_ratio(shape: Shape, tokens: int, ratio: float) -> float:
    """FLOPs of the matrices in a step of the compact engine over those of a plain one.

    Forward and input gradient, the coordinates' gradient, and once a step the weights' update.
    """
    ours = plain = 0.0
    for m, n in shape.matrices:
        k = min(m, n)
        t = int(ratio * k)
        plain += 6 * tokens * m * n
        ours += 4 * tokens * m * n + 2 * tokens * t * (m + n + t) + 2 * m * n * t + 2 * k * t * t
    return ours / plain
