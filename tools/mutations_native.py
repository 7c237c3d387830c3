"""Changes to the native CPU kernels for `mutations.py`: name, file, before, after and test."""

TESTS = "tests/sculpt_kernels/"

NATIVE = [
    (
        "native: every matrix of a batch starts at row 0",
        "native/src/cpu.cpp",
        "static_cast<uint64_t>(rounding.row0 + row)",
        "static_cast<uint64_t>(row)",
        TESTS + "test_native_kernels.py::test_stochastic_rounding_has_the_bits_of_torch",
    ),
    (
        "native: every segment of a row has the bits of the first",
        "native/src/cpu.cpp",
        "first + static_cast<uint64_t>(column / LANES)",
        "first",
        TESTS + "test_native_kernels.py::test_stochastic_rounding_has_the_bits_of_torch",
    ),
    (
        "native: ties of bfloat16 are rounded up",
        "native/src/rows.cpp",
        "(u + 0x7FFFu + ((u >> 16) & 1u))",
        "(u + 0x8000u)",
        TESTS + "test_native_kernels.py::test_conversions_are_those_of_torch",
    ),
    (
        "native: one element too many is written",
        "native/src/rows.cpp",
        "i < n; ++i)\n      write<T>(out + i * static_cast",
        "i <= n; ++i)\n      write<T>(out + i * static_cast",
        TESTS + "test_native_memory.py::test_round",
    ),
    (
        "native: a library of another ABI is taken",
        "sculpt_kernels/native.py",
        "if abi != ABI:",
        "if False:",
        TESTS + "test_native_library.py::test_a_library_of_another_version",
    ),
    (
        "native: auto leaves it aside",
        "sculpt_kernels/dispatch.py",
        'if rounding == "stochastic" and _native(device) is None else',
        "if False else",
        TESTS + "test_native_kernels.py::test_auto_takes_it_where_it_is_faster",
    ),
]
