"""compact_linear against dense autograd: values, gradients, what is saved, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sculpt_kernels import compact_linear, compact_weight, orthonormalize, reference


def problem(m: int, n: int, r: int, s: int, tokens: tuple[int, ...], dtype: torch.dtype):
    g = torch.Generator().manual_seed(m * 1000 + n * 10 + r)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    U, V = orthonormalize(rand(m, r)), orthonormalize(rand(n, s))
    tensors = (rand(*tokens, n), rand(m, n) / n**0.5, rand(m), U, V, 0.1 * rand(r, s))
    return tuple(t.to(dtype) for t in tensors)


SHAPES = [(7, 5, 2, 3), (5, 7, 5, 5), (6, 6, 1, 6), (4, 9, 0, 2), (3, 3, 3, 3)]


@pytest.mark.parametrize(("m", "n", "r", "s"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 3, 0.3])
def test_gradients_equal_those_of_the_dense_layer(m, n, r, s, bias, scale):
    x, W0, b, U, V, C = problem(m, n, r, s, (2, 3), torch.float64)
    dense = [t.clone().requires_grad_() for t in (x, b, C)]
    y = torch.nn.functional.linear(
        dense[0], W0 + scale * (U @ dense[2] @ V.T), dense[1] if bias else None
    )
    dy = torch.randn_like(y)
    y.backward(dy)

    x.requires_grad_(), b.requires_grad_(), C.requires_grad_()
    W = reference.expand_add(W0, C.detach(), U, V, scale)
    out = compact_linear(x, W, b if bias else None, U, V, C, scale=scale)
    out.backward(dy)

    torch.testing.assert_close(out, y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(x.grad, dense[0].grad, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(C.grad, dense[2].grad, rtol=1e-13, atol=1e-13)
    if bias:
        torch.testing.assert_close(b.grad, dense[1].grad, rtol=1e-13, atol=1e-13)
    flat = (x.detach().flatten(0, -2), W, dy.flatten(0, -2), U, V)
    for gradient, expected in zip(
        (x.grad, b.grad, C.grad), reference.linear_gradients(*flat, scale), strict=True
    ):
        if gradient is not None:
            torch.testing.assert_close(
                gradient.reshape(expected.shape), expected, rtol=1e-13, atol=1e-13
            )


@pytest.mark.parametrize(("m", "n", "r", "s"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_gradcheck(m, n, r, s, scale):
    x, W0, b, U, V, C = problem(m, n, r, s, (4,), torch.float64)

    def layer(x: Tensor, b: Tensor, C: Tensor) -> Tensor:
        W = reference.expand_add(W0, C.detach(), U, V, scale)
        return compact_linear(x, W, b, U, V, C, scale=scale)

    inputs = [t.requires_grad_() for t in (x, b, C)]
    assert torch.autograd.gradcheck(layer, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 11.3])
def test_low_precision_is_as_good_as_the_dense_layer(dtype, scale):
    x, W, b, U, V, C = problem(48, 80, 12, 20, (33,), dtype)
    dy = torch.randn(33, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = reference.linear_gradients(*(t.double() for t in (x, W, dy, U, V)), scale)[2]
    C = C.float().requires_grad_()
    compact_linear(x, W, b, U, V, C, scale=scale).backward(dy)

    dense = scale * (U.T @ (dy.T @ x) @ V).double()
    error = torch.linalg.norm(C.grad.double() - exact) / torch.linalg.norm(exact)
    baseline = torch.linalg.norm(dense - exact) / torch.linalg.norm(exact)
    assert C.grad.dtype == torch.float32
    # Three products, each rounding its operands once: a few units, whatever the baseline did.
    assert error <= max(2 * baseline, 3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_C", [torch.float64, torch.float32, torch.bfloat16])
def test_scale_multiplies_the_finished_gradient_once(dtype, of_C):
    x, W, b, U, V, C = problem(48, 80, 12, 20, (33,), dtype)
    dy = torch.randn(33, 48, generator=torch.Generator().manual_seed(1)).to(dtype)

    def gradients(scale: float, of_C: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (C.to(of_C), x, b)]
        compact_linear(leaves[1], W, leaves[2], U, V, leaves[0], scale=scale).backward(dy)
        return tuple(t.grad for t in leaves)

    dC, *others = gradients(7.1, of_C)
    plain, *same = gradients(1.0, torch.promote_types(dtype, of_C))
    assert torch.equal(dC, (7.1 * plain).to(of_C))
    assert all(map(torch.equal, others, same))


def test_saves_the_compressed_input_and_never_the_input():
    x, W, b, U, V, C = problem(64, 96, 8, 12, (50,), torch.float32)
    C.requires_grad_(), x.requires_grad_()
    saved: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        compact_linear(x, W, b, U, V, C)
    assert (50, 12) in saved
    assert (50, 96) not in saved


def test_backward_forms_no_dense_gradient():
    x, W, b, U, V, C = problem(64, 96, 8, 12, (50,), torch.float32)
    C.requires_grad_(), x.requires_grad_()
    shapes: set[tuple[int, ...]] = set()

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and func is not torch.ops.aten.t.default:
                shapes.add(tuple(out.shape))
            return out

    y = compact_linear(x, W, b, U, V, C)
    with Record():
        y.sum().backward()
    assert (50, 8) in shapes
    assert not shapes & {(64, 96), (96, 64)}


def test_frozen_input_and_no_grad_need_nothing():
    x, W, b, U, V, C = problem(6, 5, 2, 2, (3,), torch.float64)
    C.requires_grad_()
    compact_linear(x, W, b, U, V, C).sum().backward()
    assert x.grad is None
    assert C.grad is not None
    with torch.no_grad():
        y = compact_linear(x, W, b, U, V, C)
    assert not y.requires_grad
    torch.testing.assert_close(y, torch.nn.functional.linear(x, W, b))


def test_one_token_without_a_batch():
    x, W, b, U, V, C = problem(6, 5, 2, 3, (), torch.float64)
    x.requires_grad_(), C.requires_grad_()
    y = compact_linear(x, W, b, U, V, C)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, W, b))
    dy = torch.arange(6.0, dtype=torch.float64)
    y.backward(dy)
    dx, _, dC = reference.linear_gradients(x.detach()[None], W, dy[None], U, V)
    torch.testing.assert_close(x.grad, dx[0])
    torch.testing.assert_close(C.grad, dC)


def test_accumulates_over_two_uses():
    x, W, b, U, V, C = problem(6, 5, 2, 3, (3,), torch.float64)
    C.requires_grad_()
    compact_linear(x, W, b, U, V, C).sum().backward()
    once = C.grad.clone()
    (compact_linear(x, W, b, U, V, C) + compact_linear(x, W, b, U, V, C)).sum().backward()
    torch.testing.assert_close(C.grad, 3 * once)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_no_last_dense_product_anew(reentrant):
    m, n, r, s, tokens = 64, 96, 8, 12, 50
    x, W, b, U, V, C = problem(m, n, r, s, (tokens,), torch.float64)
    C.requires_grad_(), x.requires_grad_()
    plain = torch.autograd.grad(compact_linear(2 * x, W, b, U, V, C).sum(), (x, C))
    with FlopCounterMode(display=False) as counted:
        y = checkpoint(lambda x: compact_linear(2 * x, W, b, U, V, C), x, use_reentrant=reentrant)
        y.sum().backward()
    torch.testing.assert_close((x.grad, C.grad), plain, rtol=0, atol=0)
    forward, compressed = 2 * tokens * m * n, 2 * tokens * n * s
    backward = 2 * tokens * (m * n + m * r + r * s)
    # The reentrant variant first runs under no_grad, where nothing is saved, and then all anew.
    first = forward + (0 if reentrant else compressed)
    anew = compressed + (forward if reentrant else 0)
    assert counted.get_total_flops() == first + anew + backward


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_graph_break(checkpointed, autocast):
    x, W, b, U, V, C = problem(16, 24, 4, 3, (2, 8), torch.float32)
    leaves = [t.requires_grad_() for t in (x, b, C)]

    def layer(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return compact_linear(torch.tanh(x), W, b, U, V, C)

    def call(x: Tensor) -> Tensor:
        return (checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)).sum()

    expected = torch.autograd.grad(call(x), leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), leaves), expected)


def test_layers_of_different_scales_compile_once():
    layers = [problem(16, 16, 4, 3, (8,), torch.float32) for _ in range(3)]
    scales = (1.0, 2.5, 7.1)
    Cs = [layer[-1].requires_grad_() for layer in layers]

    def call(x: Tensor) -> Tensor:
        for (_, W, b, U, V, C), scale in zip(layers, scales, strict=True):
            x = torch.tanh(compact_linear(x, W, b, U, V, C, scale=scale))
            x = x @ compact_weight(W, U, V, C, scale=scale)
        return x.sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for step in range(3):
        x = layers[0][0] + step
        expected = torch.autograd.grad(call(x), Cs)
        torch.testing.assert_close(torch.autograd.grad(compiled(x), Cs), expected)
    assert counter.frame_count == 1


def test_autocast_gives_low_precision_output_and_full_precision_gradients():
    x, W, b, U, V, C = problem(16, 24, 4, 4, (8,), torch.float32)
    C.requires_grad_(), x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = compact_linear(x, W, b, U, V, C)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert C.grad.dtype == torch.float32
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W": lambda t: t.clone().requires_grad_()}, "W requires grad"),
        ({"x": lambda t: t[..., :-1]}, r"x must have shape \(..., 24\)"),
        ({"U": lambda t: t.T}, "U must have shape .* transposed"),
        ({"V": lambda t: t[:-1]}, "V must have shape"),
        ({"C": lambda t: t[:-1]}, "C must have shape"),
        ({"bias": lambda t: t[:-1]}, r"bias must have shape \(16,\)"),
    ],
)
def test_bad_input_is_named(change, message):
    x, W, b, U, V, C = problem(16, 24, 4, 3, (8,), torch.float32)
    arguments = {"x": x, "W": W, "bias": b, "U": U, "V": V, "C": C}
    for name, edit in change.items():
        arguments[name] = edit(arguments[name])
    with pytest.raises(ValueError, match=message):
        compact_linear(**arguments)
