"""The fused last pass, its rounding, and the weight update built on it."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import BOUNDS, DTYPES, LAYOUTS, TILE, Framed, error, orthonormal, use_tiles

from sculpt_kernels import reference
from sculpt_kernels.coordinates.expand import expand_add_ as expand_add_torch
from sculpt_kernels.coordinates.triton_expand import expand_add_, expand_add_many_
from sculpt_kernels.rounding import stochastic_round
from sculpt_kernels.triton import launcher
from sculpt_kernels.triton.tiles import TileConfig
from sculpt_kernels.triton.update import update_

pytestmark = pytest.mark.usefixtures("small_tiles")

LOW = (torch.float16, torch.bfloat16)
SEEDS = (0, 1, 2**63 + 12345, -7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("segments", [1, 2])
def test_sum_of_products(segments: int, layout: str, dtype: torch.dtype) -> None:
    X = Framed(torch.randn(2, 50, 41).to(dtype), layout)
    A, B = (Framed(torch.randn(2, size, 21).to(dtype), layout) for size in (50, 41))
    A2, B2 = (Framed(torch.randn(size, 7).to(dtype), layout) for size in (50, 41))
    want = X.tensor.double() - 0.5 * A.tensor.double() @ B.tensor.double().mT
    if segments == 2:
        want -= 0.5 * A2.tensor.double() @ B2.tensor.double().mT
    second = {"A2": A2.tensor, "B2": B2.tensor} if segments == 2 else {}
    update_(X.tensor, A.tensor, B.tensor, alpha=-0.5, **second)
    assert error(X.tensor, want) < BOUNDS[dtype]
    X.check_frame()


@pytest.mark.parametrize("subtiles", [1, 2])
@pytest.mark.parametrize("start", ["X", "base", "zero"])
def test_where_the_sum_starts(start: str, subtiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    X = torch.full((50, 41), float("nan")) if start != "X" else torch.randn(50, 41)
    base = torch.randn(50, 41).double().float() if start == "base" else None
    A, B = torch.randn(50, 3), torch.randn(41, 3)
    origin = {"X": X.double(), "base": base, "zero": 0}[start]
    want = origin + 2 * A.double() @ B.double().mT
    use_tiles(monkeypatch, update=TileConfig(32, 16, 16, 4, 2, subtiles=subtiles))
    update_(X, A, B, alpha=torch.tensor(2.0), base=base, keep=start != "zero")
    assert error(X, want) < BOUNDS[X.dtype]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_stochastic_rounding_gives_the_bits_of_the_torch_backend(
    seed: int, dtype: torch.dtype
) -> None:
    exponents = torch.randint(-30, 14, (3, 21, 37))
    base = torch.randn(3, 21, 37) * 2.0**exponents
    base[0, 0, :4] = torch.tensor([float("inf"), -float("inf"), 65520.0, 2.0**-26])
    X = Framed(torch.zeros(3, 21, 37).to(dtype))
    none = torch.zeros(21, 0), torch.zeros(37, 0)
    update_(X.tensor, *none, base=base, rounding="stochastic", seed=seed)
    want = stochastic_round(base.view(-1, 37), dtype, seed).view_as(base)
    assert torch.equal(X.tensor.view(torch.int16), want.view(torch.int16))
    tensor = torch.tensor((seed + 2**63) % 2**64 - 2**63)
    again = torch.zeros(3, 21, 37).to(dtype)
    update_(again, *none, base=base, rounding="stochastic", seed=tensor)
    assert torch.equal(again.view(torch.int16), want.view(torch.int16))


def test_random_bits_depend_on_position_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randn(40, 40)
    none = torch.zeros(40, 0), torch.zeros(40, 0)
    results = []
    for config in (TILE, TileConfig(16, 32, 16, 4, 2), TileConfig(64, 64, 16, 4, 2, subtiles=2)):
        use_tiles(monkeypatch, update=config)
        X = torch.empty(40, 40, dtype=torch.bfloat16)
        results.append(update_(X, *none, base=base, rounding="stochastic", seed=5))
    # A batch that has no common stride is rounded in two launches, and counts its rows on.
    batch = torch.empty(2, 3, 10, 40, dtype=torch.bfloat16)[:, :2]
    none = torch.zeros(10, 0), torch.zeros(40, 0)
    update_(batch, *none, base=base.view(2, 2, 10, 40), rounding="stochastic", seed=5)
    results.append(batch.reshape(40, 40))
    for other in results[1:]:
        assert torch.equal(results[0], other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(50, 41), (41, 50)])
def test_weight_update(shape: tuple[int, int], dtype: torch.dtype) -> None:
    m, n = shape
    W = Framed(torch.randn(2, m, n).to(dtype))
    C = torch.randn(2, 5, 9)
    U, V = orthonormal(2, m, 5, dtype=dtype), orthonormal(n, 9, dtype=dtype)
    want = reference.expand_add(W.tensor.double(), C.double(), U.double(), V.double(), 0.7)
    expand_add_(W.tensor, C, U, V, 0.7)
    assert error(W.tensor, want) < BOUNDS[dtype]
    W.check_frame()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("start", ["W", "base"])
def test_stochastic_weight_update_agrees_with_torch(start: str, dtype: torch.dtype) -> None:
    W, C = torch.randn(2, 30, 41).to(dtype), torch.randn(5, 9)
    U, V = orthonormal(2, 30, 5, dtype=dtype), orthonormal(41, 9, dtype=dtype)
    base = torch.randn(2, 30, 41) if start == "base" else None
    options = {"alpha": 0.3, "rounding": "stochastic", "seed": 99, "base": base}
    ours = expand_add_(W.clone(), C, U, V, **options)
    theirs = expand_add_torch(W.clone(), C, U, V, backend="torch", **options)
    # Same random bits; the float32 sums differ in their last bits, which rarely decides.
    assert (ours != theirs).float().mean() < 2e-3


def test_the_product_of_16_bit_bases_reaches_float32() -> None:
    C = torch.randn(5, 9)
    U, V = (orthonormal(size, rank, dtype=torch.float16) for size, rank in ((30, 5), (41, 9)))
    W = torch.zeros(30, 41)
    want = reference.expand_add(W.double(), C.double(), U.double(), V.double())
    expand_add_(W, C, U, V)
    assert error(W, want) < 1e-6


@pytest.mark.parametrize(("r", "s"), [(0, 0), (0, 3), (3, 0)])
def test_no_coordinates_leave_the_weight(r: int, s: int) -> None:
    W = torch.randn(20, 30)
    before = W.clone()
    expand_add_(W, torch.zeros(r, s), torch.zeros(20, r), torch.zeros(30, s))
    assert torch.equal(W, before)
    base = torch.randn(20, 30)
    expand_add_(W, torch.zeros(r, s), torch.zeros(20, r), torch.zeros(30, s), base=base)
    assert torch.equal(W, base)


@pytest.mark.parametrize("missing", ["U", "V"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_update_without_a_basis_on_one_side(dtype: torch.dtype, missing: str) -> None:
    m, n, r = 37, 26, 9
    B = orthonormal(n if missing == "U" else m, r, dtype=dtype)
    C = torch.randn((m, r) if missing == "U" else (r, n))
    U, V = (None, B) if missing == "U" else (B, None)
    W = Framed(torch.randn(m, n).to(dtype))
    eyes = (torch.eye(m).double(), torch.eye(n).double())
    want = reference.expand_add(
        W.tensor.double(),
        C.double(),
        eyes[0] if U is None else U.double(),
        eyes[1] if V is None else V.double(),
    )
    expand_add_(W.tensor, C, U, V)
    assert error(W.tensor, want) < BOUNDS[dtype]
    W.check_frame()


@pytest.mark.parametrize("shape", [(37, 26), (26, 37)], ids=str)
@pytest.mark.parametrize("missing", ["none", "U", "V"])
@pytest.mark.parametrize(
    ("dtype", "basis", "rounding"),
    [
        (torch.float32, torch.float32, "nearest"),
        (torch.bfloat16, torch.float32, "stochastic"),
        (torch.float16, torch.float16, "nearest"),
        (torch.float16, torch.float16, "stochastic"),
    ],
)
def test_many_weights_as_one_by_one(
    dtype: torch.dtype, basis: torch.dtype, rounding: str, missing: str, shape: tuple[int, int]
) -> None:
    """One launch for those of one layout; bit for bit what single launches give."""
    m, n = shape
    count, r, s = 4, (m if missing == "U" else 5), (n if missing == "V" else 7)
    # Rows of 48 elements in a buffer: 16-byte aligned, with strides that are not the shape's.
    Ws = [torch.randn(m, 48).to(dtype)[:, :n] for _ in range(count)]
    bases = [torch.randn(m, 48).to(dtype)[:, :n] for _ in range(count)]
    bases[2] = torch.randn(m, 49).to(dtype)[:, 1 : n + 1]  # unaligned: a launch of its own
    Cs = [torch.randn(r, s) for _ in range(count)]
    Us = [None if missing == "U" else orthonormal(m, r, dtype=basis) for _ in range(count)]
    Vs = [None if missing == "V" else orthonormal(n, s, dtype=basis) for _ in range(count)]
    seeds = torch.tensor([5, -(2**40), 7, 2**62]) if rounding == "stochastic" else None
    expected = []
    for i in range(count):
        seed = None if seeds is None else seeds[i]
        one = Ws[i].clone(memory_format=torch.preserve_format)
        expand_add_(one, Cs[i], Us[i], Vs[i], 0.5, rounding, seed, bases[i])
        expected.append(one)
    with launcher.record() as launches:
        expand_add_many_(Ws, Cs, Us, Vs, 0.5, rounding, seeds, bases)
    assert sum(launch.arguments["TABLE"] for launch in launches) == 1
    expand_add_many_(Ws, Cs, Us, Vs, 0.5, rounding, seeds, bases)
    for got, want in zip(Ws, expected, strict=True):
        assert torch.equal(got, want)
