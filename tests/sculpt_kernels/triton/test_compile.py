"""What the compiler makes of every kernel, for three architectures, without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import offline

from sculpt_kernels.triton import tiles

# The kernels that differ most, on the architecture that is most used; the rest is slow to compile.
QUICK = {
    90: {
        ("project_ core", "bfloat16"),
        ("project_ core", "float32"),
        ("project_ left", "bfloat16"),
        ("project_ strict", "bfloat16"),
        ("project_many_ core", "bfloat16"),
        ("compress", "bfloat16"),
        ("sketch", "float64"),
        ("expand_add_ stochastic", "float16"),
        ("expand_add_many_ stochastic", "bfloat16"),
        ("project_adamw_ update", "bfloat16"),
        ("project_adamw_ gradient", "bfloat16"),
        ("project_adamw_ strict", "bfloat16"),
    },
    80: {
        ("project_ core", "bfloat16"),
        ("project_ strict", "bfloat16"),
        ("project_adamw_ gradient", "bfloat16"),
    },
    # Less shared memory than the others have: the configurations further down in the tables.
    86: {
        ("project_ core", "bfloat16"),
        ("project_ strict", "bfloat16"),
        ("project_adamw_ strict", "bfloat16"),
    },
    100: {
        ("project_ core", "float16"),
        ("project_adamw_ gradient", "bfloat16"),
    },
}


def cases() -> list[object]:
    found = []
    for arch in QUICK:
        for point in offline.points():
            name = str(point.dtype).removeprefix("torch.")
            marks = () if (point.name, name) in QUICK[arch] else (pytest.mark.slow,)
            label = f"{point.name} {name} sm_{arch}".replace(" ", "-")
            found.append(pytest.param(point, arch, marks=marks, id=label))
    return found


@pytest.mark.parametrize(("point", "arch"), cases())
def test_default_configurations(point: offline.Point, arch: int) -> None:
    limit = tiles.shared_limit(divmod(arch, 10))
    for row in offline.compile_point(point, arch):
        assert row.spills == row.stack == 0, f"registers spill: {row}"
        assert row.registers < 256, row
        assert row.shared <= limit, row
        if row.kernel == "sketch_kernel":
            continue  # it reads and multiplies nothing
        assert row.wide_loads > 0, f"no load of 16 bytes: {row}"
        if point.dtype != torch.float32 and row.kernel != "direction_kernel":
            assert row.tensor_core > 0, f"no tensor-core instruction: {row}"
        if point.dtype != torch.float32 and row.kernel == "step_kernel":
            # Two programs on a multiprocessor, so that one computes while the other waits.
            assert 2 * row.warps * 32 * row.registers <= 65536, row
            assert 2 * row.shared <= limit, row


def test_tables_of_addresses_cost_no_wide_loads() -> None:
    """Addresses from memory need their alignment said, or every load is scalar."""
    points = {(point.name, point.dtype): point for point in offline.points()}
    one = offline.compile_point(points["project_ core", torch.bfloat16], 90)
    many = offline.compile_point(points["project_many_ core", torch.bfloat16], 90)
    assert [row.wide_loads for row in many] == [row.wide_loads for row in one]


def test_scalars_on_the_device_are_read_by_the_kernels_alone() -> None:
    """The host must not read them, as a captured graph demands; on meta tensors it cannot."""
    from sculpt_kernels.adamw import triton as adamw
    from sculpt_kernels.coordinates import triton_expand as expand_add
    from sculpt_kernels.triton import launcher

    def of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    U, V = of(64, 32, dtype=torch.bfloat16), of(48, 32, dtype=torch.bfloat16)
    with launcher.record() as launches:
        for project in ("update", "gradient"):
            adamw.project_adamw_(
                of(64, 48), of(64, 48, dtype=torch.bfloat16), of(64, 48), of(64, 48), U, V,
                form="core", project=project, lr=of(), betas=(of(), of()), eps=of(),
                weight_decay=of(), step=of(dtype=torch.int64), copy=of(64, 48, dtype=U.dtype),
                rounding="stochastic", seed=of(dtype=torch.int64),
            )  # fmt: skip
        expand_add.expand_add_(of(64, 48, dtype=U.dtype), of(32, 32), U, V, of(), "nearest", None)
        several = [of(64, 48, dtype=U.dtype)] * 2, [of(32, 32)] * 2, [U] * 2, [V] * 2
        seeds = of(2, dtype=torch.int64)
        expand_add.expand_add_many_(*several, of(), "stochastic", seeds)
    scalars = {
        "direction_kernel": {"rest1", "rest2", "eps", "weight_decay", "step"},
        "step_kernel": {"rest1", "rest2", "eps", "weight_decay", "step", "lr", "seed"},
        "update_kernel": {"alpha"},
    }
    # Small products come first, one for each matrix, with a scale that is a number.
    *steps, _, one, _, _, many = launches
    assert {launch.kernel.fn.__name__ for launch in (*steps, one, many)} == set(scalars)
    assert many.arguments["seed"].shape == seeds.shape
    for launch in (*steps, one, many):
        for name in scalars[launch.kernel.fn.__name__]:
            value = launch.arguments[name]
            assert isinstance(value, torch.Tensor), name
            assert value.ndim == 0, name


def test_tables_of_addresses_outlive_the_cache_in_captured_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A replay reads memory that nobody else may have by then."""
    from sculpt_kernels.triton import launcher

    monkeypatch.setattr(launcher, "_captured", {})
    monkeypatch.setattr(
        launcher, "_address_table", lambda pointers, device: torch.tensor(pointers, device="cpu")
    )
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        launcher.address_table((16, 32), torch.device("cuda", 0))
        assert len(launcher._captured) == capturing
    assert launcher.address_table((16,), torch.device("cpu")).tolist() == [16]
    assert len(launcher._captured) == 1
