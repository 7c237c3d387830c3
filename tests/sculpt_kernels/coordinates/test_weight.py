"""compact_weight, compact_embedding and missing bases against dense autograd in float64."""

from __future__ import annotations

import weakref

import pytest
import torch
from matrices import basis, gaussian
from torch.utils._python_dispatch import TorchDispatchMode

from sculpt_kernels import compact_embedding, compact_linear, compact_weight, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rounded(X: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if X is None else X.to(dtype)


def wide_or_eye(B: torch.Tensor | None, size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64) if B is None else B.double()


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> bool:
    """Three products, each rounding its operands once."""
    eps = max(torch.finfo(dtype).eps, 2.0**-50)
    return float((got.double() - want).norm()) <= 6 * eps * float(want.norm()) + 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("r", "s"), [(4, 3), (1, 9), (0, 2), (7, 9), (None, 3), (4, None)])
@pytest.mark.parametrize("scale", [1.0, 5.3])
def test_compact_weight(dtype, r, s, scale):
    m, n, experts = 7, 9, 3
    U = None if r is None else basis(m, r, experts, dtype=torch.float64)
    V = None if s is None else basis(n, s, dtype=torch.float64, seed=1)
    U, V = rounded(U, dtype), rounded(V, dtype)
    W = gaussian(experts, n, m, dtype=dtype).mT
    C = torch.zeros(experts, m if r is None else r, n if s is None else s, requires_grad=True)
    out = compact_weight(W, U, V, C, scale=scale)
    assert torch.equal(out, W)
    dW = gaussian(experts, m, n, dtype=dtype, seed=2)
    out.backward(dW)
    want = scale * reference.compress(dW.double(), wide_or_eye(U, m), wide_or_eye(V, n))
    assert C.grad.dtype == torch.float32
    assert C.grad.shape == C.shape
    assert close(C.grad, want, torch.float32 if dtype == torch.float64 else dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("r", "s"), [(4, 3), (1, 6), (0, 2), (11, 6), (None, 3), (4, None)])
@pytest.mark.parametrize("padding", [None, 5])
@pytest.mark.parametrize("scale", [1.0, 5.3])
def test_compact_embedding(dtype, r, s, padding, scale):
    m, n = 11, 6
    U = None if r is None else basis(m, r, dtype=dtype)
    V = None if s is None else basis(n, s, dtype=dtype, seed=1)
    W = gaussian(m, n, dtype=dtype)
    ids = torch.tensor([[5, 0, 10, 5], [2, 5, 2, 7]])
    C = torch.zeros(m if r is None else r, n if s is None else s, requires_grad=True)
    out = compact_embedding(ids, W, U, V, C, padding_idx=padding, scale=scale)
    assert torch.equal(out, W[ids])
    dy = gaussian(2, 4, n, dtype=dtype, seed=2)
    out.backward(dy)
    kept = dy.double().flatten(0, 1)
    if padding is not None:
        kept = kept * (ids.flatten() != padding).unsqueeze(1)
    want = reference.embedding_gradient(
        ids.flatten(), kept, W.double(), wide_or_eye(U, m), wide_or_eye(V, n), scale
    )
    assert close(C.grad, want, torch.float32 if dtype == torch.float64 else dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_of_a_whole_weight_leaves_its_gradient_to_the_layer(dtype):
    W, dW = gaussian(7, 9, dtype=dtype), gaussian(7, 9, dtype=dtype, seed=1)
    before = dW.clone()
    C = torch.zeros(7, 9, dtype=dtype, requires_grad=True)
    compact_weight(W, None, None, C, scale=1.7).backward(dW)
    assert torch.equal(dW, before)
    assert torch.equal(C.grad, 1.7 * dW)


def test_no_gradient_of_a_whole_table_is_formed():
    m, n = 31, 14
    U, V, W = basis(m, 4), basis(n, 3, seed=1), gaussian(m, n)
    C = torch.zeros(4, 3, dtype=W.dtype, requires_grad=True)
    out = compact_embedding(torch.tensor([3, 3, 7]), W, U, V, C)
    sizes: set[int] = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.add(result.numel())
            return result

    with Record():
        out.sum().backward()
    assert max(sizes) == 3 * n


def test_a_dense_gradient_is_gone_before_the_next_one_comes():
    n, count = 12, 4
    U, V = basis(n, 3), basis(n, 3, seed=1)
    C = [torch.zeros(3, 3, dtype=U.dtype, requires_grad=True) for _ in range(count)]
    formed: list[weakref.ref[torch.Tensor]] = []

    def note(gradient: torch.Tensor) -> None:
        assert not any(ref() is not None for ref in formed)
        formed.append(weakref.ref(gradient))

    x = gaussian(5, n, seed=9)
    for number in range(count):
        weight = compact_weight(gaussian(n, n, seed=number), U, V, C[number])
        weight.register_hook(note)
        x = torch.tanh(x @ weight)
    del weight
    x.sum().backward()
    assert len(formed) == count
    assert all(c.grad is not None for c in C)


NO_NUMBER = [(TypeError, bad) for bad in (True, "1", None, torch.ones(()))]
OUT_OF_RANGE = [(ValueError, bad) for bad in (0, 0.0, -1.0, float("inf"), float("nan"))]


@pytest.mark.parametrize(("kind", "scale"), NO_NUMBER + OUT_OF_RANGE)
def test_scale_is_a_finite_number_above_zero(kind, scale):
    W, U, V, C = gaussian(7, 5), basis(7, 2), basis(5, 3), torch.zeros(2, 3)
    for call in (
        lambda: compact_weight(W, U, V, C, scale=scale),
        lambda: compact_embedding(torch.tensor([1]), W, U, V, C, scale=scale),
        lambda: compact_linear(gaussian(2, 5), W, None, U, V, C, scale=scale),
    ):
        with pytest.raises(kind, match="scale must be a finite number above 0; got"):
            call()


@pytest.mark.parametrize("missing", ["U", "V"])
def test_compact_linear_without_a_basis_on_one_side(missing):
    m, n, r = 7, 5, 3
    x, W, dy = gaussian(2, 4, n), gaussian(m, n, seed=1), gaussian(2, 4, m, seed=2)
    U = None if missing == "U" else basis(m, r)
    V = None if missing == "V" else basis(n, r)
    C = torch.zeros(m if U is None else r, n if V is None else r, dtype=W.dtype, requires_grad=True)
    x.requires_grad_()
    compact_linear(x, W, None, U, V, C).backward(dy)
    flat = [X.detach().flatten(0, 1) for X in (x, dy)]
    want = reference.linear_gradients(flat[0], W, flat[1], wide_or_eye(U, m), wide_or_eye(V, n))
    torch.testing.assert_close(x.grad.flatten(0, 1), want[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(C.grad, want[2], rtol=1e-13, atol=1e-13)


def test_bad_input_is_named():
    W, U, V, C = gaussian(7, 5), basis(7, 2), basis(5, 3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"C must have shape .* r = 2 .* s = 3"):
        compact_weight(W, U, V, C.T)
    with pytest.raises(ValueError, match=r"C must have shape .* r = 7"):
        compact_weight(W, None, V, C)
    with pytest.raises(ValueError, match="U must have shape"):
        compact_weight(W, V, V, C)
    with pytest.raises(ValueError, match=r"W requires grad .* W.requires_grad_\(False\)"):
        compact_weight(W.clone().requires_grad_(), U, V, C)
    with pytest.raises(TypeError, match="ids must be integers; got a tensor of shape"):
        compact_embedding(torch.zeros(3), W, U, V, C)
    with pytest.raises(ValueError, match=r"batch dimensions \(\)"):
        compact_weight(W, U, V, torch.zeros(2, 2, 3))
