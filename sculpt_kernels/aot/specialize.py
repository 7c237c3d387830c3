"""What Triton compiles a launch for: types, constants, and divisibility of its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def specialize(
    kernel: Any, arguments: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes of a launch, as Triton derives them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        fixed = parameter.do_not_specialize
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not fixed):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type_of(value)
        divisible = value.data_ptr() if isinstance(value, Tensor) else value
        if not fixed and isinstance(divisible, int) and divisible % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        names |= {torch.int64: "i64", torch.float64: "fp64"}
        return f"*{names[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
