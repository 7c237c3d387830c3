"""Bad input: a clear error that names the argument, before anything is changed."""

from __future__ import annotations

import math

import pytest
import torch
from matrices import basis, gaussian

from sculpt_kernels import compress, expand_add_, project, project_, project_adamw_, project_many_

M, N, R, S = 12, 20, 3, 4


def arguments(dtype=torch.float32):
    return gaussian(M, N, dtype=dtype), basis(M, R, dtype=dtype), basis(N, S, dtype=dtype)


G, U, V = arguments()
NAN = U.clone()
NAN[0, 1] = math.nan
INF = V.clone()
INF[3, 0] = math.inf
SHARED = torch.zeros(M * N + 8)

BAD = {
    "U transposed": (lambda: (G, U.T, V, {}), ValueError, r"U must have shape .*transposed"),
    "V of the other side": (lambda: (G, U, U, {}), ValueError, "V must have shape .*right side"),
    "bases swapped": (lambda: (G, V, U, {}), ValueError, "U must have shape .*left side"),
    "too many columns": (
        lambda: (G, torch.zeros(M, M + 1), V, {}),
        ValueError,
        "U must have at most 12",
    ),
    "wrong batch": (
        lambda: (G.expand(2, M, N).clone(), U.expand(3, M, R), V, {}),
        ValueError,
        "U must be two-dimensional or have the batch",
    ),
    "not a matrix": (lambda: (G[0], U, V, {}), ValueError, r"G must have shape \(\.\.\., m, n\)"),
    "not a tensor": (lambda: (G.tolist(), U, V, {}), TypeError, "G must be a torch.Tensor"),
    "basis not a tensor": (lambda: (G, U.tolist(), V, {}), TypeError, "U must be a torch.Tensor"),
    "integers": (lambda: (G.int(), U.int(), V.int(), {}), TypeError, "G must have one of .*int32"),
    "complex": (lambda: (G + 0j, U, V, {}), TypeError, "G must have one of .*complex64"),
    "float8": (
        lambda: (G.to(torch.float8_e4m3fn), U, V, {}),
        TypeError,
        "G must have one of .*float8",
    ),
    "dtype of one basis": (lambda: (G, U.double(), V, {}), TypeError, "one dtype.*U float64"),
    "dtype of G": (lambda: (G.bfloat16(), U, V, {}), TypeError, "one dtype; got G bfloat16"),
    "device": (lambda: (G, U.to("meta"), V, {}), ValueError, "one device; got .*U on meta"),
    "no U": (lambda: (G, None, V, {}), ValueError, "form='core' needs U; got None"),
    "no V": (lambda: (G, U, None, {"form": "strict"}), ValueError, "needs V"),
    "left with V": (lambda: (G, U, V, {"form": "left"}), ValueError, "does not use V"),
    "right with U": (lambda: (G, U, V, {"form": "right"}), ValueError, "does not use U"),
    "unknown form": (lambda: (G, U, V, {"form": "loose"}), ValueError, "form must be one of"),
    "form of another type": (lambda: (G, U, V, {"form": 2}), ValueError, "form must be one of"),
    "unknown backend": (lambda: (G, U, V, {"backend": "cuda"}), ValueError, "backend must be"),
    "unknown complement": (lambda: (G, U, V, {"complement": True}), ValueError, "complement must"),
    "complement of a side that is not there": (
        lambda: (G, U, None, {"form": "left", "complement": "right"}),
        ValueError,
        "complement must be one of 'none', 'left'",
    ),
    "NaN in U": (lambda: (G, NAN, V, {}), ValueError, "U must be finite; got 1 NaN"),
    "NaN in U, one-sided": (
        lambda: (G, NAN, None, {"form": "left"}),
        ValueError,
        "U must be finite",
    ),
    "NaN in U, more ranks": (
        lambda: (torch.zeros(80, 90), torch.full((80, 50), math.nan), torch.ones(90, 50), {}),
        ValueError,
        "U must be finite",
    ),
    "NaN in V, one-sided": (
        lambda: (torch.zeros(80, 90), None, torch.full((90, 50), math.nan), {"form": "right"}),
        ValueError,
        "V must be finite",
    ),
    "NaN in U, large matrix": (
        lambda: (torch.zeros(3000, N), torch.full((3000, 2), math.nan), V, {}),
        ValueError,
        "U must be finite",
    ),
}
IN_PLACE = {
    "requires grad": (
        lambda: (G.clone().requires_grad_(), U, V, {}),
        ValueError,
        "G requires grad",
    ),
    "expanded": (lambda: (G[:1].expand(M, N), U, V, {}), ValueError, "G must not be an expanded"),
    "overlaps U": (
        lambda: (SHARED[: M * N].view(M, N), SHARED[-M * R :].view(M, R), V, {}),
        ValueError,
        "must not share memory with U",
    ),
    "overlaps V": (
        lambda: (SHARED[: M * N].view(M, N), U, SHARED[: N * S].view(N, S), {}),
        ValueError,
        "must not share memory with V",
    ),
    "is V": (lambda: (V, basis(N, R).float(), V[:4, :2], {}), ValueError, "share memory with V"),
    "requires grad, one-sided": (
        lambda: (G.clone().requires_grad_(), U, None, {"form": "left"}),
        ValueError,
        "G requires grad",
    ),
}


@pytest.mark.parametrize("name", [*BAD, *IN_PLACE])
def test_project_in_place_refuses(name):
    make, kind, message = (BAD | IN_PLACE)[name]
    X, A, B, options = make()
    before = X.detach().clone() if isinstance(X, torch.Tensor) else None
    with pytest.raises(kind, match=message):
        project_(X, A, B, **options)
    if before is not None:
        assert torch.equal(X.detach(), before)


@pytest.mark.parametrize("name", BAD)
def test_project_refuses(name):
    make, kind, message = BAD[name]
    X, A, B, options = make()
    with pytest.raises(kind, match=message):
        project(X, A, B, **options)


@pytest.mark.parametrize("name", [*BAD, *IN_PLACE])
def test_project_many_names_the_matrix_and_changes_none(name):
    make, kind, message = (BAD | IN_PLACE)[name]
    X, A, B, options = make()
    if "form" in options:
        first = G.clone()
        others = (None if A is None else U, None if B is None else V)
    else:
        first, others = G.clone(), (U, V)
    before = first.clone()
    with pytest.raises(kind, match=message):
        project_many_([first, X], [others[0], A], [others[1], B], **options)
    assert torch.equal(first, before)


def test_project_many_refuses_lists_that_do_not_fit():
    with pytest.raises(ValueError, match="Us must have one basis for each of the 2"):
        project_many_([G, G.clone()], [U], [V, V])
    with pytest.raises(TypeError, match="Gs must be a list"):
        project_many_(G, [U], [V])
    with pytest.raises(ValueError, match="share memory; got overlapping matrices 0 and 2"):
        project_many_([G, G.clone(), G[:, :10]], [U, U, U], [V, V, basis(10, 2).float()])
    with pytest.raises(ValueError, match="matrix 1 of Gs: V must have shape"):
        project_many_([G, G.clone()], [U, U], [V, U])


def test_columns_of_one_buffer_are_no_overlap():
    buffer = torch.zeros(M, N + R)
    buffer[:, :N], buffer[:, N:] = G, U
    project_(buffer[:, :N], buffer[:, N:], V)
    assert torch.equal(buffer[:, N:], U)
    torch.testing.assert_close(buffer[:, :N], project(G, U, V))
    with pytest.raises(ValueError, match="share memory with U"):
        project_(buffer[:, :N], buffer[:, N - 1 : N + 2], V)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_backend_that_cannot_run_says_why(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("Triton runs here")
    before = G.clone()
    with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot run here: .+"):
        project_(G, U, V, backend=backend)
    assert torch.equal(G, before)


@pytest.mark.parametrize("form", ["core", "strict", "left", "right"])
def test_bases_that_require_grad_leave_no_trace_in_the_matrix(form):
    A = None if form == "right" else U.clone().requires_grad_()
    B = None if form == "left" else V.clone().requires_grad_()
    X = project_(G.clone(), A, B, form=form)
    assert not X.requires_grad
    plain = [None if Y is None else Y.detach() for Y in (A, B)]
    torch.testing.assert_close(X, project(G, *plain, form=form))


def test_autograd_is_refused_only_where_it_is_recording():
    X = G.clone().requires_grad_()
    with torch.no_grad():
        project_(X, U, V)
    torch.testing.assert_close(X.detach(), project(G, U, V))
    assert not project(X, U, V).requires_grad


def test_compress_refuses():
    with pytest.raises(TypeError, match="out_dtype must be a floating dtype"):
        compress(G, U, V, out_dtype=torch.int32)
    with pytest.raises(TypeError, match="one dtype"):
        compress(G, U.double(), V)
    with pytest.raises(ValueError, match="V must have shape"):
        compress(G, U, U)
    with pytest.raises(ValueError, match="U must be finite"):
        compress(G, NAN, V)


C = gaussian(R, S, dtype=torch.float32)
BAD_EXPAND = {
    "C transposed": ({"C": C.T}, ValueError, "C must have shape .* r = 3 columns of U and s = 4"),
    "integer C": ({"C": C.int()}, TypeError, "C must have one of"),
    "alpha": ({"alpha": "1"}, TypeError, "alpha must be a number or a 0-d tensor"),
    "alpha vector": ({"alpha": torch.ones(2)}, ValueError, "alpha must be"),
    "rounding": ({"rounding": "up"}, ValueError, "rounding must be one of"),
    "seed without use": ({"seed": 1}, ValueError, "seed is only for rounding='stochastic'"),
    "stochastic float32": (
        {"rounding": "stochastic", "seed": 1},
        TypeError,
        "W is float32, which needs none",
    ),
    "no seed": (
        {"W": G.bfloat16(), "rounding": "stochastic"},
        TypeError,
        "rounding='stochastic' needs seed",
    ),
    "float seed": (
        {"W": G.bfloat16(), "rounding": "stochastic", "seed": 1.0},
        TypeError,
        "needs seed, an int",
    ),
    "seed vector": (
        {"W": G.bfloat16(), "rounding": "stochastic", "seed": torch.ones(2, dtype=torch.int64)},
        TypeError,
        "seed must be an int or a 0-d int64",
    ),
    "base shape": ({"base": G[:5]}, ValueError, "base must have the shape"),
    "base dtype": ({"base": G.bfloat16()}, TypeError, "base must have the dtype float32"),
    "bases of two dtypes": ({"U": U.double()}, TypeError, "one dtype"),
    "bases of another dtype": (
        {"U": U.half(), "V": V.half()},
        TypeError,
        "U must have the dtype",
    ),
    "NaN in U": ({"U": NAN}, ValueError, "U must be finite; got 1 NaN"),
    "infinity in V": ({"V": INF}, ValueError, "V must be finite"),
    "requires grad": ({"W": G.clone().requires_grad_()}, ValueError, "W requires grad"),
    "W is base": ({"W": SHARED[: M * N].view(M, N), "base": SHARED[8:].view(M, N)}, ValueError,
                  "must not share memory with base"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_EXPAND)
def test_expand_add_refuses(name):
    changes, kind, message = BAD_EXPAND[name]
    given = {"W": G.clone(), "C": C, "U": U, "V": V} | changes
    W = given["W"]
    before = W.detach().clone()
    with pytest.raises(kind, match=message):
        expand_add_(given.pop("W"), given.pop("C"), given.pop("U"), given.pop("V"), **given)
    assert torch.equal(W.detach(), before)


BAD_STEP = {
    "project": ({"project": "both"}, ValueError, "project must be one of 'update', 'gradient'"),
    "shape of a moment": ({"exp_avg": G[:, :5]}, ValueError, "exp_avg must have the shape"),
    "integer moment": ({"exp_avg_sq": G.int()}, TypeError, "exp_avg_sq must have one of"),
    "shape of copy": ({"copy": G[:5].bfloat16()}, ValueError, "copy must have the shape"),
    "negative lr": ({"lr": -1.0}, ValueError, "lr must be at least 0"),
    "lr as text": ({"lr": "1e-3"}, TypeError, "lr must be a number"),
    "lr not finite": ({"lr": math.nan}, ValueError, "lr must be finite"),
    "lr vector": ({"lr": torch.ones(2)}, ValueError, "lr must be a number or a 0-d"),
    "beta of one": ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be .* below 1"),
    "three betas": ({"betas": (0.9, 0.99, 0.999)}, TypeError, "betas must be two numbers"),
    "negative eps": ({"eps": -1e-8}, ValueError, "eps must be at least 0"),
    "step zero": ({"step": 0}, ValueError, "step must be at least 1"),
    "float step": ({"step": 1.0}, TypeError, "step must be an int"),
    "V of the wrong side": ({"V": U}, ValueError, "V must have shape .*right side of W"),
    "bases of two dtypes": ({"U": U.double()}, TypeError, "one dtype"),
    "W requires grad": ({"W": G.clone().requires_grad_()}, ValueError, "W requires grad"),
    "stochastic without seed": (
        {"copy": G.bfloat16(), "rounding": "stochastic"},
        TypeError,
        "needs seed",
    ),
    "stochastic float32": ({"rounding": "stochastic", "seed": 1}, TypeError, "W is float32"),
    "NaN basis": ({"U": NAN}, ValueError, "U must be finite"),
    "device": ({"exp_avg": G.to("meta")}, ValueError, "one device; got .*exp_avg on meta"),
}


def step_arguments():
    names = ("W", "G", "exp_avg", "exp_avg_sq")
    tensors = {name: gaussian(M, N, dtype=torch.float32, seed=i) for i, name in enumerate(names)}
    tensors["exp_avg_sq"].square_()
    return tensors | {"U": U, "V": V, "lr": 1e-3, "step": 1}


@pytest.mark.parametrize("name", BAD_STEP)
def test_project_adamw_refuses(name):
    changes, kind, message = BAD_STEP[name]
    given = step_arguments() | changes
    before = {key: value.detach().clone() for key, value in given.items() if torch.is_tensor(value)}
    with pytest.raises(kind, match=message):
        project_adamw_(**given)
    for key, value in before.items():
        if value.device.type == "cpu":
            assert torch.equal(given[key].detach(), value) or value.isnan().any(), key


def test_project_adamw_refuses_shared_memory():
    given = step_arguments()
    given["exp_avg_sq"] = given["exp_avg"]
    with pytest.raises(ValueError, match=r"exp_avg is written .* share memory with exp_avg_sq"):
        project_adamw_(**given)
    given = step_arguments()
    given["G"] = given["W"]
    with pytest.raises(ValueError, match=r"W is written .* share memory with G"):
        project_adamw_(**given)
