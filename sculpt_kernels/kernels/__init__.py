"""Triton kernels, one module per operation: device code, its launcher, and `supports`.

Importing this package imports no Triton and opens no device; the modules in it import Triton.
Launchers take arguments that the public functions have validated and trust them; whether a kernel
can run on them at all is each module's `supports(...)`, which returns `None` or the reason why not.

| module       | launchers                     | computes                                          |
|--------------|-------------------------------|---------------------------------------------------|
| `project`    | `project_`, `project_many_`   | the four forms at ranks up to 128                 |
| `compress`   | `compress`                    | `Uᵀ G V` at ranks up to 128                       |
| `update`     | `update_`, `project_large_`   | `X <- round(base + alpha (A Bᵀ + A₂ B₂ᵀ))`        |
| `expand_add` | `expand_add_`                 | `W <- round(base + alpha U C Vᵀ)`                 |
| `adamw`      | `project_adamw_`              | AdamW in the epilogue of the projection           |
| `sketch`     | `sketch`                      | the random test matrix of subspace methods        |
"""
