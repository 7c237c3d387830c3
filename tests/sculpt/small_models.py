"""Small models of every layer kind that can be sculpted, with inputs that reach all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from sculpt import SculptConfig, Sculptor
from sculpt.task.compact import CoordinateMatrix

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
ENGINES: dict[str, dict[str, Any]] = {
    "compact": {},
    "full": {"coordinates": "full"},
    "update": {"engine": "update"},
    "core": {"constraint": "core"},
}
"""Whatever keeps its constraint with any optimizer."""
EXPERTS = LLAMA | {"num_hidden_layers": 1, "num_experts_per_tok": 2}


def begin(
    model: nn.Module,
    config: SculptConfig,
    make: type[torch.optim.Optimizer] = torch.optim.AdamW,
    **options: Any,
) -> tuple[Sculptor, torch.optim.Optimizer]:
    """A task on `model`, with an optimizer of these options attached."""
    sculptor = Sculptor(model, config)
    sculptor.begin_task()
    optimizer = make(sculptor.parameters(), **options)
    sculptor.attach(optimizer)
    return sculptor, optimizer


def projected_sgd(sculptor: Sculptor, lr: float) -> torch.optim.Optimizer:
    """Steps that move each weight by `lr` times its projected gradient."""
    groups = []
    for matrix in sculptor._task.matrices.values():
        scale = matrix.state.scale if isinstance(matrix, CoordinateMatrix) else 1.0
        groups.append({"params": [matrix.trained], "lr": lr / scale**2})
    return torch.optim.SGD(groups)


def projected(matrix: CoordinateMatrix, G: torch.Tensor) -> torch.Tensor:
    """A dense gradient in the coordinates of a matrix, but for its scale: `Uᵀ G V`."""
    U, V, R = matrix.bases.U, matrix.bases.V, matrix.bases.removed
    found = G if U is None else U.mT @ G
    found = found if V is None else found @ V
    if R is None:
        return found
    return found - (R @ (R.mT @ found) if U is None else found @ R @ R.mT)


@dataclass(frozen=True)
class Kind:
    """A model, the weights to sculpt, and how many of them there are."""

    make: Callable[[], nn.Module]
    count: int
    targets: Any = "all-linear"
    images: bool = False

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().to(dtype).eval()
        if dtype == torch.float64:
            # The grouped product of the library knows no float64.
            model.set_experts_implementation("eager")
        return model

    def loss(self, model: nn.Module, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.images:
            dtype = next(model.parameters()).dtype
            pixels = torch.randn(3, 3, 8, 8, generator=generator).to(dtype)
            return model(pixel_values=pixels, labels=torch.tensor([0, 1, 1])).loss
        ids = torch.randint(1, 40, (3, 7), generator=generator)
        labels = torch.tensor([0, 1, 1]) if "Classification" in type(model).__name__ else ids
        return model(input_ids=ids, labels=labels).loss


KINDS = {
    "linear": Kind(lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), 14),
    "tied head and embedding": Kind(
        lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)), 1, ["lm_head"]
    ),
    "embedding and head, not tied": Kind(
        lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False)),
        2,
        ["lm_head", "embed_tokens"],
    ),
    "conv1d, fused qkv": Kind(
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
        ),
        4,
    ),
    "mixtral experts": Kind(
        lambda: MixtralForCausalLM(MixtralConfig(**EXPERTS, num_local_experts=3)), 6
    ),
    "qwen experts": Kind(
        lambda: Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                **EXPERTS,
                num_experts=4,
                moe_intermediate_size=12,
                shared_expert_intermediate_size=20,
                decoder_sparse_step=1,
            )
        ),
        9,
    ),
    "gpt-oss experts": Kind(
        lambda: GptOssForCausalLM(
            GptOssConfig(**EXPERTS, num_local_experts=3, head_dim=8, layer_types=["full_attention"])
        ),
        6,
    ),
    "t5": Kind(
        lambda: T5ForConditionalGeneration(
            T5Config(
                vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
                decoder_start_token_id=0,
            )
        ),
        16,
    ),
    "bart": Kind(
        lambda: BartForConditionalGeneration(
            BartConfig(
                vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
                decoder_ffn_dim=24, max_position_embeddings=16, pad_token_id=0,
                decoder_start_token_id=1, forced_eos_token_id=None,
            )
        ),
        16,
    ),
    "bert": Kind(
        lambda: BertForSequenceClassification(
            BertConfig(
                vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=24, max_position_embeddings=16,
            )
        ),
        7,
    ),
    "vision transformer": Kind(
        lambda: ViTForImageClassification(
            ViTConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
                image_size=8, patch_size=4, num_labels=2,
            )
        ),
        6,
        images=True,
    ),
}  # fmt: skip
