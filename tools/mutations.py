"""Break the code on purpose, one small change at a time, and see which test notices.

    python tools/mutations.py                # every change; a minute or two, needs Triton
    python tools/mutations.py int64 sides    # changes whose name contains one of the words

Each change is made in a copy of the tree, never in the tree itself. The named test must pass there
without the change and fail with it; the exit code is 1 if one does not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS, KERNEL_TESTS = "sculpt_kernels/", "tests/sculpt_kernels/"
INTERPRETER = KERNEL_TESTS + "triton/interpreter/test_interpreted_"
TASK, TASK_TESTS = "sculpt/task/", "tests/sculpt/task/test_"

# An editable install finds its packages before PYTHONPATH does, in the tree that it was made from.
IN_THE_COPY = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not hasattr(f, "known_packages")]
"""


@dataclass(frozen=True)
class Mutation:
    """`before` becomes `after` in `file`, and `test` must fail."""

    name: str
    file: str
    before: str
    after: str
    test: str


MUTATIONS = [
    Mutation(
        "mask: one row too many in every kernel",
        KERNELS + "triton/common.py",
        "return (rows < m)[:, None] &",
        "return (rows <= m)[:, None] &",
        INTERPRETER + "project.py::test_forms_layouts_and_dtypes",
    ),
    Mutation(
        "mask: the end of a chunk of columns",
        KERNELS + "projection/triton_kernels.py",
        "min(n, start + chunk), s,",
        "n, s,",
        INTERPRETER + "project.py::test_columns_are_divided_where_rows_are_few",
    ),
    Mutation(
        "stride: a walk along contiguous rows only",
        KERNELS + "projection/triton_kernels.py",
        "tl.full((), BLOCK_K, tl.int64) * stride_gn",
        "tl.full((), BLOCK_K, tl.int64)",
        INTERPRETER + "project.py::test_forms_layouts_and_dtypes",
    ),
    Mutation(
        "stride: all operands of a step are laid out like the weights",
        KERNELS + "adamw/triton.py",
        "ALIKE=all(x.stride()[1:] == w.stride()[1:] for x in others),",
        "ALIKE=True,",
        INTERPRETER + "adamw.py::test_layouts_and_parts_of_the_epilogue",
    ),
    Mutation(
        "int64: offsets of a tile in 32 bits",
        KERNELS + "triton/common.py",
        "down = rows.to(tl.int64)[:, None] * stride_row",
        "down = rows[:, None] * stride_row",
        INTERPRETER + "addresses.py::test_project_beyond_two_billion_elements",
    ),
    Mutation(
        "int64: the corner of a tile in 32 bits",
        KERNELS + "triton/common.py",
        "(row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column)",
        "(row * stride_row + column * stride_column)",
        INTERPRETER + "addresses.py::test_offsets_are_64_bits_wide",
    ),
    Mutation(
        "int64: the step of a walk in 32 bits",
        KERNELS + "projection/triton_kernels.py",
        "g_step = tl.full((), BLOCK_K, tl.int64)",
        "g_step = tl.full((), BLOCK_K, tl.int32)",
        INTERPRETER + "addresses.py::test_one_step_of_a_walk_may_pass_two_billion_elements",
    ),
    Mutation(
        "int64: the distance between matrices in 32 bits",
        KERNELS + "triton/common.py",
        "return X + tl.cast(index, tl.int64) * stride",
        "return X + index * stride",
        INTERPRETER + "addresses.py::test_matrices_of_a_batch_may_be_two_billion_elements_apart",
    ),
    Mutation(
        "sides: the transposed matrix keeps its bases, in the kernels",
        KERNELS + "projection/triton.py",
        "G, U, V = G.mT, V, U\n        table",
        "G = G.mT\n        table",
        INTERPRETER + "project.py::test_forms_layouts_and_dtypes",
    ),
    Mutation(
        "sides: the transposed matrix keeps its bases, on the CPU",
        KERNELS + "projection/row_panels.py",
        "G, U, V = G.t(), V, U",
        "G = G.t()",
        KERNEL_TESTS
        + "projection/test_project.py::test_any_strides_and_nothing_beside_the_matrix_changes",
    ),
    Mutation(
        "sides: the short side is contracted first",
        KERNELS + "plan/projections.py",
        "return min(options, key=lambda o: (o.flops,",
        "return max(options, key=lambda o: (o.flops,",
        KERNEL_TESTS + "plan/test_plan.py::test_contracts_the_long_side_first",
    ),
    Mutation(
        "complement: the other side is taken for the one that is kept",
        KERNELS + "projection/library.py",
        "if complement == near:",
        "if complement not in (near, 'none'):",
        KERNEL_TESTS + "projection/test_project.py::test_values",
    ),
    Mutation(
        "complement: not mirrored with a column-major matrix",
        KERNELS + "projection/row_panels.py",
        "_MIRROR.get(complement, complement)",
        "complement",
        KERNEL_TESTS
        + "projection/test_project.py::test_any_strides_and_nothing_beside_the_matrix_changes",
    ),
    Mutation(
        "accumulation: in the dtype of the matrix, on the CPU",
        KERNELS + "products.py",
        "return torch.promote_types(dtype, torch.float32)",
        "return dtype",
        KERNEL_TESTS + "projection/test_project.py::test_converted_panels_round_once",
    ),
    Mutation(
        "accumulation: float16 in the kernels",
        KERNELS + "projection/triton_kernels.py",
        "acc = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)",
        "acc = tl.zeros((BLOCK_M, RANK), dtype=tl.float16)",
        INTERPRETER + "project.py::test_coordinates",
    ),
    Mutation(
        "rounding: every matrix of a batch starts at row 0, in the kernels",
        KERNELS + "triton/update.py",
        "first = index.to(tl.int64) * m + row",
        "first = row",
        INTERPRETER + "update.py::test_stochastic_rounding_gives_the_bits_of_the_torch_backend",
    ),
    Mutation(
        "rounding: every panel starts at row 0, on the CPU",
        KERNELS + "rounding.py",
        "torch.arange(row0, row0 + rows, device=device)",
        "torch.arange(0, rows, device=device)",
        KERNEL_TESTS + "test_rounding.py::test_same_seed_same_bits_whatever_the_panels",
    ),
    Mutation(
        "AdamW: the bias correction is one step late, in the kernels",
        KERNELS + "adamw/triton_kernels.py",
        "count = integer(step)\n",
        "count = integer(step) - 1\n",
        INTERPRETER + "adamw.py::test_step",
    ),
    Mutation(
        "AdamW: no bias correction of the second moment, on the CPU",
        KERNELS + "adamw/adamw.py",
        "return 1 - self.beta2**self.step",
        "return 1.0",
        KERNEL_TESTS + "adamw/test_adamw.py::test_formulas",
    ),
    Mutation(
        "graphs: a scalar on the device is read by the host",
        KERNELS + "triton/launcher.py",
        "    if isinstance(x, Tensor) and x.device == device:\n        return x\n    x = float(x)",
        "    x = float(x)",
        KERNEL_TESTS
        + "triton/test_compile.py::test_scalars_on_the_device_are_read_by_the_kernels_alone",
    ),
    Mutation(
        "addresses: those of a table are not known to be aligned",
        KERNELS + "triton/common.py",
        "return tl.multiple_of(address, 16)",
        "return address",
        KERNEL_TESTS + "triton/test_compile.py::test_tables_of_addresses_cost_no_wide_loads",
    ),
    Mutation(
        "operators: AdamW does not say that it writes the copy",
        KERNELS + "ops.py",
        "Tensor(d!)? copy",
        "Tensor? copy",
        KERNEL_TESTS + "test_ops.py::test_adamw_operator",
    ),
    Mutation(
        "checks: NaN in a large basis passes the quick way",
        KERNELS + "projection/small.py",
        "return largest != largest",
        "return False",
        KERNEL_TESTS + "test_checks.py::test_project_in_place_refuses",
    ),
    Mutation(
        "split: what trailing columns have of leading ones is not looked at",
        KERNELS + "subspaces/right_basis.py",
        "return bool((rows <= allowed * unit * squares.sqrt()).all())",
        "return True",
        KERNEL_TESTS
        + "subspaces/test_right_basis.py::test_bases_agree_where_trailing_columns_are_mostly_noise",
    ),
    Mutation(
        "split: values that look like zero in a Gram matrix are taken for it",
        KERNELS + "subspaces/right_basis.py",
        "return rank if bool((found <= rounding).all()) else k",
        "return rank",
        KERNEL_TESTS + "subspaces/test_right_basis.py::test_numerical_rank",
    ),
    Mutation(
        "native: every matrix of a batch starts at row 0",
        "native/src/cpu.cpp",
        "static_cast<uint64_t>(row0 + row)",
        "static_cast<uint64_t>(row)",
        KERNEL_TESTS + "test_native_kernels.py::test_stochastic_rounding_has_the_bits_of_torch",
    ),
    Mutation(
        "native: every segment of a row has the bits of the first",
        "native/src/cpu.cpp",
        "group + static_cast<uint64_t>(column / LANES)",
        "group",
        KERNEL_TESTS + "test_native_kernels.py::test_stochastic_rounding_has_the_bits_of_torch",
    ),
    Mutation(
        "native: NaN of bfloat16 becomes infinity",
        "native/src/cpu.cpp",
        "0x7FC0u : raw >> 16",
        "0x7F80u : raw >> 16",
        KERNEL_TESTS + "test_native_kernels.py::test_special_values_are_rounded_as_by_torch",
    ),
    Mutation(
        "native: one element too many is written",
        "native/src/cpu.cpp",
        "reinterpret_cast<char *>(rounded), 2, 2, count)",
        "reinterpret_cast<char *>(rounded), 2, 2, count + 1)",
        KERNEL_TESTS + "test_native_memory.py::test_round",
    ),
    Mutation(
        "native: a library of another ABI is taken",
        KERNELS + "native.py",
        "if abi != ABI:",
        "if False:",
        KERNEL_TESTS + "test_native_library.py::test_a_library_of_another_version",
    ),
    Mutation(
        "native: auto leaves it aside",
        KERNELS + "dispatch.py",
        'if rounding == "stochastic" and _native(device) is None else',
        "if False else",
        KERNEL_TESTS + "test_native_kernels.py::test_auto_takes_it_where_it_is_faster",
    ),
    Mutation(
        "steps: weights do not follow",
        TASK + "attachment.py",
        "if not self._left_out:\n            self._update()",
        "if self._left_out:\n            self._update()",
        TASK_TESTS + "stepping.py::test_a_closure_gives_the_steps_of_a_plain_loop",
    ),
    Mutation(
        "steps: the last evaluation of a closure counts for all",
        TASK + "attachment.py",
        "dropped and (self._left_out or not evaluations)",
        "dropped",
        TASK_TESTS + "stepping.py::test_weights_follow_what_any_finite_evaluation_moved",
    ),
    Mutation(
        "steps: a closure given by name is not seen",
        TASK + "attachment.py",
        'kwargs | {"closure": watched}',
        "kwargs",
        TASK_TESTS + "stepping.py::test_a_closure_without_finite_gradients_changes_nothing",
    ),
    Mutation(
        "steps: gradients that are not finite are dropped in any case",
        TASK + "attachment.py",
        "if not self._skip_nonfinite:",
        "if False:",
        TASK_TESTS + "stepping.py::test_steps_that_are_not_finite_are_taken_where_that_is_wanted",
    ),
    Mutation(
        "steps: hooks of a task stay when it ends",
        TASK + "attachment.py",
        "            handle.remove()",
        "            pass",
        TASK_TESTS + "other_optimizers.py::test_an_attached_optimizer_whose_task_is_over",
    ),
    Mutation(
        "steps: those of others are refused beside an attached optimizer",
        TASK + "guards.py",
        "(self.driven and not is_idle(optimizer))",
        "False",
        TASK_TESTS + "other_optimizers.py::test_optimizers_of_others_are_left_alone",
    ),
    Mutation(
        "steps: coordinates beside frozen weights are not seen",
        TASK + "guards.py",
        "        if not self._is_of_task(optimizer):\n",
        "        if True:\n",
        TASK_TESTS + "other_optimizers.py::test_all_parameters_of_the_model_by_hand",
    ),
    Mutation(
        "guards: another device is no move",
        TASK + "guards.py",
        "if (now.dtype, now.device) != (was.dtype, was.device):",
        "if now.dtype != was.dtype:",
        TASK_TESTS + "model_changes.py::test_a_moved_model_is_refused_before_anything_moves",
    ),
    Mutation(
        "guards: anything may be in the place of a module",
        TASK + "guards.py",
        "children.get(child) is not module for",
        "children.get(child) is None for",
        TASK_TESTS + "model_changes.py::test_a_replaced_module_is_found_before_the_step",
    ),
    Mutation(
        "steps: a fold that fails leaves what it did",
        TASK + "engines.py",
        "            matrix.undo(index in done)",
        "            pass",
        TASK_TESTS + "failing_steps.py::test_a_failing_fold_leaves_the_weights_as_before_the_step",
    ),
    Mutation(
        "writing: weights that were written are not taken up",
        TASK + "compact.py",
        "                self._take_up()",
        "                pass",
        TASK_TESTS + "writing.py::test_the_best_weights_are_kept",
    ),
    Mutation(
        "writing: what the task cannot have done is taken up",
        TASK + "compact.py",
        "if outside > rounding * (2 if weight.dtype in LOW_PRECISION else AVERAGED):",
        "if False:",
        TASK_TESTS + "writing.py::test_what_the_task_cannot_have_done_is_refused",
    ),
    Mutation(
        "writing: projected weights may be anything",
        TASK + "projected.py",
        "if outside > AVERAGED * rounding_bound(W, None):",
        "if False:",
        TASK_TESTS + "writing.py::test_what_the_task_cannot_have_done_is_refused",
    ),
    Mutation(
        "writing: what is written through .data is not seen before a step",
        TASK + "running.py",
        "written = self._probe.differs() or",
        "written =",
        TASK_TESTS + "writing.py::test_training_goes_on_from_what_was_written",
    ),
    Mutation(
        "moving: an evaluation does not look at values",
        TASK + "layers.py",
        "                state.suspect = True",
        "                pass",
        TASK_TESTS + "moving.py::test_averages_are_swapped_in_around_an_evaluation",
    ),
    Mutation(
        "reading: a weight that is read has no gradient",
        TASK + "layers.py",
        "if not torch.is_grad_enabled() or is_divided(stored):",
        "if True:",
        TASK_TESTS + "reading.py::test_the_gradient_is_that_of_the_dense_weight_projected",
    ),
    Mutation(
        "rates: coordinates are not scaled",
        TASK + "compact.py",
        "return math.sqrt(weight.numel() / C.numel())",
        "return 1.0",
        "tests/sculpt/test_sculptor.py::test_a_dense_rate_moves_weights_as_far_as_dense_adamw",
    ),
    Mutation(
        "certificate: stored weights are not looked at",
        "sculpt/certificate/leak.py",
        "self.leak <= self.limit and self.rounding <= self.rounding_limit",
        "self.leak <= self.limit",
        "tests/sculpt/certificate/test_certificate.py::test_stored_weights_that_are_elsewhere_break_the_certificate",
    ),
    Mutation(
        "undo: what was learned stays",
        TASK + "matrix.py",
        "        self.weight.copy_(self.before())",
        "        pass",
        TASK_TESTS + "undo.py::test_weights_flags_and_classes_are_those_from_before",
    ),
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only changes whose name contains one of these")
    options = parser.parse_args(arguments)
    chosen = [
        mutation
        for mutation in MUTATIONS
        if not options.words or any(word in mutation.name for word in options.words)
    ]
    missed = 0
    with copied() as tree:
        passed: dict[str, bool] = {}
        for mutation in chosen:
            if mutation.test not in passed:
                passed[mutation.test] = run(tree, mutation.test)
            caught = passed[mutation.test] and is_caught(tree, mutation)
            missed += not caught
            verdict = "caught" if caught else "MISSED"
            if not passed[mutation.test]:
                verdict = "the test fails without the change"
            print(f"{verdict:7} {mutation.name}  [{mutation.test}]", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return int(missed > 0)


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the files of the tree, tracked or about to be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, Path(folder) / name)
        (Path(folder) / "sitecustomize.py").write_text(IN_THE_COPY, encoding="utf-8")
        yield Path(folder)


def is_caught(tree: Path, mutation: Mutation) -> bool:
    """Whether the test fails with the change; the copy is as it was afterwards."""
    path = tree / mutation.file
    original = path.read_text(encoding="utf-8")
    path.write_text(changed(original, mutation), encoding="utf-8")
    try:
        return not run(tree, mutation.test)
    finally:
        path.write_text(original, encoding="utf-8")


def changed(text: str, mutation: Mutation) -> str:
    """The text with the change made in every place where it applies.

    Raises:
        ValueError: the text does not hold what the change replaces.
    """
    if mutation.before not in text:
        raise ValueError(f"{mutation.file} must contain {mutation.before!r} ({mutation.name})")
    return text.replace(mutation.before, mutation.after)


def run(tree: Path, test: str) -> bool:
    """Whether a test passes in a copy of the tree; one that kills the process does not.

    Raises:
        RuntimeError: pytest found no such test, or could not start.
    """
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["TRITON_INTERPRET"] = "1" if test.startswith(INTERPRETER) else "0"
    if test.startswith(KERNEL_TESTS + "test_native"):
        build(tree)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode > 1:
        raise RuntimeError(f"pytest could not run {test}:\n{done.stdout}\n{done.stderr}")
    return done.returncode == 0


def build(tree: Path) -> None:
    """The native library of a copy, where its tests look for it."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or "cmake"
    folder = ["-B", "build/native", "-DBUILD_TESTING=OFF"]
    for command in ([cmake, "-S", ".", *folder], [cmake, "--build", "build/native", "--parallel"]):
        subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    raise SystemExit(main())
