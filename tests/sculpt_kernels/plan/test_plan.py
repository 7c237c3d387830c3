"""plan: against enumeration of every order of multiplication, and against what really runs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from matrices import COMPLEMENTS, FORMS, basis, gaussian, sides
from torch.utils._python_dispatch import TorchDispatchMode

from sculpt_kernels import Plan, plan, project_
from sculpt_kernels.plan.devices import DEVICES, device_model
from sculpt_kernels.plan.projections import arrange
from sculpt_kernels.projection import library

CASES = [(form, complement) for form in FORMS for complement in COMPLEMENTS[form]]
GRID = [(64, 64), (48, 96), (96, 48)]


def orders(shapes):
    """Costs of every way to multiply a chain of matrices of these shapes."""
    if len(shapes) == 1:
        yield 0
        return
    for cut in range(1, len(shapes)):
        here = 2 * shapes[0][0] * shapes[cut][0] * shapes[-1][1]
        for left, right in itertools.product(orders(shapes[:cut]), orders(shapes[cut:])):
            yield left + right + here


@pytest.mark.parametrize(("m", "n"), GRID)
@pytest.mark.parametrize("r", [1, 7, 24, 40])
@pytest.mark.parametrize("s", [1, 9, 30])
def test_core_is_the_cheapest_order_of_its_six_matrices(m, n, r, s):
    """`U Uᵀ G V Vᵀ` in every order; the last product may be fused with the subtraction."""
    chain = [(m, r), (r, m), (m, n), (n, s), (s, n)]
    found = plan((m, n), (r, s), form="core", device="cpu", complement="none")
    assert found.flops == min(orders(chain))
    kept = plan((m, n), (m - r, n - s), form="strict", device="H100", complement="both")
    assert kept.flops == min(orders(chain))


@pytest.mark.parametrize(("m", "n"), GRID)
@pytest.mark.parametrize("r", [1, 7, 24, 40])
def test_one_side_is_the_cheapest_order(m, n, r):
    for form, chain in (
        ("left", [(m, r), (r, m), (m, n)]),
        ("right", [(m, n), (n, r), (r, n)]),
    ):
        found = plan((m, n), r, form=form, device="cpu", complement="none")
        other = plan((m, n), r, form=form, device="cpu", complement=form)
        size = m if form == "left" else n
        # Beyond half of the side a dense projector beats the direct form; a complement beats both.
        if r <= size // 2:
            assert found.flops == min(orders(chain))
        assert min(found.flops, other.flops) <= min(orders(chain))


@pytest.mark.parametrize("device", ["cpu", "H100"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n"), [(4096, 4096), (4096, 11008), (11008, 4096), (576, 1536)])
def test_the_choice_is_the_best_of_all_forms_and_complements(m, n, form, device):
    k = min(m, n)
    for r in sorted({k // 32, k // 8, k // 4, k // 2, 3 * k // 4, k - 1}):
        options = [
            plan((m, n), r, form=form, device=device, complement=complement)
            for complement in COMPLEMENTS[form]
        ]
        best = plan((m, n), r, form=form, device=device)
        assert best.seconds == min(option.seconds for option in options)
        assert best in options
        assert best.seconds == max(best.compute_seconds, best.memory_seconds)


class CountProducts(TorchDispatchMode):
    """Floating-point operations of the matrix products that really run, in place or not."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "mm" in name:
            A, B = args[1:3] if "add" in name else args[:2]
            self.flops += 2 * A.shape[0] * A.shape[1] * B.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("form", "complement"), CASES)
@pytest.mark.parametrize(("m", "n", "a", "b"), [(30, 50, 6, 8), (50, 30, 6, 8), (40, 40, 30, 5)])
def test_what_is_planned_is_what_runs(form, complement, fused, m, n, a, b):
    U, V = sides(form, basis(m, a), basis(n, b))
    G = gaussian(m, n)
    planned = arrange(form, complement, m, n, a if U is not None else 0,
                      b if V is not None else 0, fused)  # fmt: skip
    with CountProducts() as counter:
        if fused:
            library.project_batch(G, U, V, form, complement)
        else:
            project_(G, U, V, form=form, complement=complement)
    assert counter.flops == planned.flops


def crossover(shape, form, device, **options):
    """Smallest removed share of min(m, n) from which the plan takes a complement."""
    k = min(shape)
    for r in range(1, k, k // 128):
        if plan(shape, r, form=form, device=device, **options).complement != "none":
            return r / k
    return 1.0


def test_crossovers():
    square, rectangular = (4096, 4096), (4096, 11008)

    def both_from(form, device):
        k = 4096
        for r in range(1, k, 32):
            direct = plan(square, r, form=form, device=device, complement="none")
            both = plan(square, r, form=form, device=device, complement="both")
            if both.compute_seconds < direct.compute_seconds:
                return r / k
        return 1.0

    # With p = r/k, one update: 4p + 4p² = 8(1-p) + 4(1-p)² and 8p + 4p² = 4(1-p) + 4(1-p)².
    assert both_from("core", "H100") == pytest.approx(0.60, abs=0.01)
    assert both_from("strict", "H100") == pytest.approx(0.40, abs=0.01)
    # Row panels do not form the small products: 4p + 4p² = 8(1-p), 8p = 4(1-p) + 4(1-p)².
    assert both_from("core", "cpu") == pytest.approx((math.sqrt(17) - 3) / 2, abs=0.01)
    assert both_from("strict", "cpu") == pytest.approx((5 - math.sqrt(17)) / 2, abs=0.01)
    # One side given by its complement pays off before both: 8p + 4p² = 4(1-p) + 4p(1-p).
    assert crossover(square, "strict", "H100") == pytest.approx((math.sqrt(3) - 1) / 2, abs=0.01)
    assert crossover(square, "left", "H100") == pytest.approx(0.5, abs=0.02)
    assert crossover(rectangular, "core", "H100") == pytest.approx(0.5, abs=0.02)
    assert plan(rectangular, 3072, form="core").complement == "left"
    assert plan((11008, 4096), 3072, form="core").complement == "right"


@pytest.mark.parametrize(
    ("shape", "rank", "form", "gflop", "megabytes"),
    [
        ((4096, 4096), 128, "core", 8.86, 104.9),
        ((4096, 4096), 512, "core", 38.7, 117.4),
        ((4096, 4096), 2048, "core", 206.2, 167.8),
        ((4096, 11008), 1024, "core", 201.9, 332.4),
        ((4096, 11008), 2048, "core", 438.1, 394.3),
        ((4096, 4096), 2048, "left", 137.4, 134.2),
    ],
)
def test_known_figures(shape, rank, form, gflop, megabytes):
    found = plan(shape, rank, form=form, dtype=torch.bfloat16, device="H100", complement="none")
    assert found.flops / 1e9 == pytest.approx(gflop, rel=5e-3)
    assert found.bytes / 1e6 == pytest.approx(megabytes, rel=5e-3)


def test_contracts_the_long_side_first():
    assert not plan((4096, 11008), 1024, form="core").transposed
    assert plan((11008, 4096), 1024, form="core").transposed
    # The smaller rank decides where the ranks differ more than the sides.
    assert plan((4096, 4096), (16, 512), form="core").transposed


def test_kernels():
    assert plan((4096, 4096), 128, device="H100").kernel == "two-launch"
    assert plan((4096, 4096), 129, device="H100").kernel == "library"
    assert plan((4096, 4096), (64, 200), device="H100").kernel == "library"
    assert plan((4096, 4096), 64, device="H100", dtype=torch.float64).kernel == "library"
    assert plan((4096, 4096), 64, device="cpu").kernel == "panels"
    assert plan((4096, 4096), 128, device="A100").bound == "memory"
    assert plan((4096, 4096), 1024, device="A100").bound == "compute"


def test_it_reads_as_a_sentence():
    text = str(plan((4096, 11008), 2048, form="strict", device="H100"))
    assert text == (
        "The strict projection of a 4096 x 11008 bfloat16 matrix with ranks 2048 and 2048 removed "
        "on H100 takes 4 library products, the last one in place, contracting the left side first, "
        "with the complement as basis of the left side (1.46x faster than without): 554 GFLOP, "
        "304 MB, at least 700 µs, compute-bound."
    )
    text = str(plan((192, 576), 6, form="left", device="cpu", dtype=torch.float32))
    assert "rank 6 removed on cpu takes 2 products in row panels" in text
    assert "memory-bound." in text
    assert str(plan((8, 8), 0)).endswith("is the identity: nothing to compute.")


def test_identity_and_vanishing_ranks():
    assert plan((8, 9), 0).algorithm == "identity"
    assert plan((8, 9), (0, 3), form="core").flops == 0
    one_sided = plan((8, 9), 3, form="right", device="cpu", complement="none")
    strict = plan((8, 9), (0, 3), form="strict", device="cpu", complement="none")
    assert strict.flops == one_sided.flops > 0
    assert plan((0, 9), 0, form="strict").algorithm == "identity"


def test_devices():
    assert device_model("h100") is DEVICES["H100"]
    assert device_model(torch.device("cpu")) is DEVICES["cpu"]
    if not torch.cuda.is_available():
        assert device_model("cuda") is DEVICES["H100"]
        assert device_model(None) is DEVICES["cpu"]
    with pytest.raises(ValueError, match="device must be one of H100"):
        plan((8, 8), 2, device="abacus")


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        (((8,), 2), {}, ValueError, "shape must be"),
        (((8, -1), 2), {}, ValueError, "shape must be"),
        (((8, 9.0), 2), {}, ValueError, "shape must be"),
        (((8, 9), 9), {}, ValueError, "rank must be between 0 and m = 8"),
        (((8, 9), (2, 10)), {}, ValueError, "rank must be between 0 and n = 9"),
        (((8, 9), 0.5), {}, TypeError, "rank must be an int"),
        (((8, 9), True), {}, TypeError, "rank must be an int"),
        (((8, 9), 2), {"form": "both"}, ValueError, "form must be one of"),
        (((8, 9), 2), {"dtype": torch.int8}, TypeError, "dtype must be a floating dtype"),
        (((8, 9), 2), {"form": "left", "complement": "both"}, ValueError, "complement must be"),
    ],
)
def test_bad_input(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        plan(*arguments, **options)


def test_a_plan_is_a_value():
    a, b = plan((64, 64), 8, device="cpu"), plan((64, 64), 8, device="cpu")
    assert isinstance(a, Plan)
    assert a == b
    with pytest.raises(AttributeError):
        a.flops = 0
