"""Triton kernels compiled ahead of time: a pack is built once and needs no compiler afterwards.

    python -m sculpt_kernels.aot --arch 90 --matrix 4096x4096 --rank 128 1024 --out pack

With `SCULPT_AOT=pack` the package takes its kernels from there; `cmake -DSCULPT_AOT=ON` builds the
same pack into a library for C and C++, `native/include/sculpt_kernels/aot.h`.

| module       | holds                                                            |
|--------------|------------------------------------------------------------------|
| `specialize` | what a launch is compiled for                                    |
| `calls`      | the operations that are packed, recorded on tensors without memory |
| `pack`       | the folder: its layout, what it refuses, how a kernel is found   |
| `build`      | compiling into a folder                                          |
| `c_source`   | the same folder as C++ tables                                    |
"""
