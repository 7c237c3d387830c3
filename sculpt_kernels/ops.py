"""`torch.library` operators: what `torch.compile`, fake tensors and exporters see.

Each operator stands for one public function and runs it. A scalar that may be a number or a 0-d
tensor is two arguments of the operator, `x` and `x_tensor`. Eager calls on plain tensors never come
here: see `sculpt_kernels.operation.is_traced`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from sculpt_kernels.adamw.adamw import project_adamw_
from sculpt_kernels.coordinates.compress import compress
from sculpt_kernels.coordinates.expand import expand_add_, expand_add_many_
from sculpt_kernels.projection.project import project, project_, project_many_

_PROJECTION = "str form, str backend, str complement"
_ROUNDING = "str rounding, SymInt? seed, Tensor? seed_tensor"

SCHEMAS: dict[Callable[..., Any], str] = {
    project_: f"(Tensor(a!) G, Tensor? U, Tensor? V, {_PROJECTION}) -> ()",
    project: f"(Tensor G, Tensor? U, Tensor? V, {_PROJECTION}) -> Tensor",
    project_many_: f"(Tensor(a!)[] Gs, Tensor?[] Us, Tensor?[] Vs, {_PROJECTION}) -> ()",
    compress: "(Tensor G, Tensor U, Tensor V, ScalarType out_dtype, str backend) -> Tensor",
    expand_add_: (
        "(Tensor(a!) W, Tensor C, Tensor? U, Tensor? V, float? alpha, Tensor? alpha_tensor, "
        f"{_ROUNDING}, Tensor? base, str backend) -> ()"
    ),
    expand_add_many_: (
        "(Tensor(a!)[] Ws, Tensor[] Cs, Tensor?[] Us, Tensor?[] Vs, float? alpha, "
        "Tensor? alpha_tensor, str rounding, Tensor? seeds, Tensor[] bases, str backend) -> ()"
    ),
    project_adamw_: (
        "(Tensor(a!) W, Tensor G, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor? U, Tensor? V, "
        "str form, str project, float? lr, Tensor? lr_tensor, float? beta1, Tensor? beta1_tensor, "
        "float? beta2, Tensor? beta2_tensor, float? eps, Tensor? eps_tensor, "
        "float? weight_decay, Tensor? weight_decay_tensor, SymInt? step, Tensor? step_tensor, "
        f"str complement, Tensor(d!)? copy, {_ROUNDING}, str backend) -> ()"
    ),
}


def _register(function: Callable[..., Any], schema: str) -> Any:
    written = re.findall(r"!\)\S* (\w+)", schema)

    def run(*arguments: Any) -> Any:
        names = [argument.name for argument in operator._opoverload._schema.arguments]
        given = dict(zip(names, arguments, strict=True))
        for name in [name for name in given if name.endswith("_tensor")]:
            tensor = given.pop(name)
            if tensor is not None:
                given[name.removesuffix("_tensor")] = tensor
        if "beta1" in given:
            given["betas"] = given.pop("beta1"), given.pop("beta2")
        if "bases" in given:
            given["bases"] = given["bases"] or None
        out = function(**given)
        return None if written else out

    name = f"sculpt_kernels::{function.__name__}"
    operator = custom_op(name, run, mutates_args=written, schema=schema)
    operator.register_fake(_FAKES.get(function, lambda *_: None))
    return operator


def _fake_compress(G: Tensor, U: Tensor, V: Tensor, out_dtype: torch.dtype, _: str) -> Tensor:
    return G.new_empty(*G.shape[:-2], U.shape[-1], V.shape[-1], dtype=out_dtype)


# An operator that only writes to its arguments has no output to describe.
_FAKES: dict[Callable[..., Any], Callable[..., Any]] = {
    project: lambda G, *_: torch.empty_like(G),
    compress: _fake_compress,
}

OPERATORS = [_register(function, schema) for function, schema in SCHEMAS.items()]
