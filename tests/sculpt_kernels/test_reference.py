"""The specification itself, against the formulas written out with dense projectors."""

from __future__ import annotations

import pytest
import torch
from matrices import COMPLEMENTS, FORMS, basis, gaussian, projected, sides

from sculpt_kernels import reference

CASES = [(form, complement) for form in FORMS for complement in COMPLEMENTS[form]]


@pytest.mark.parametrize(("form", "complement"), CASES)
def test_project(form, complement):
    G = gaussian(2, 9, 13)
    U, V = sides(form, basis(9, 3, 2), basis(13, 4))
    before = G.clone()
    got = reference.project(G, U, V, form, complement)
    torch.testing.assert_close(got, projected(G, U, V, form, complement))
    assert torch.equal(G, before)


def test_what_vanishes():
    G, U, V = gaussian(9, 13), basis(9, 3), basis(13, 4)

    def zero(X):
        return float(X.abs().max()) < 1e-13

    assert zero(U.T @ reference.project(G, U, V, "core") @ V)
    strict = reference.project(G, U, V, "strict")
    assert zero(U.T @ strict)
    assert zero(strict @ V)
    assert zero(U.T @ reference.project(G, U, None, "left"))
    assert zero(reference.project(G, None, V, "right") @ V)


def test_a_complement_is_the_other_part_of_a_full_basis():
    m, n, r, s = 9, 13, 3, 4
    G, Q, P = gaussian(m, n), basis(m, m), basis(n, n)
    for form in FORMS:
        want = reference.project(G, *sides(form, Q[:, :r], P[:, :s]), form)
        for complement in COMPLEMENTS[form]:
            U = Q[:, r:] if complement in ("left", "both") else Q[:, :r]
            V = P[:, s:] if complement in ("right", "both") else P[:, :s]
            got = reference.project(G, *sides(form, U, V), form, complement)
            torch.testing.assert_close(got, want)


def test_compress_and_expand_are_adjoint():
    G, U, V, C = gaussian(9, 13), basis(9, 3), basis(13, 4), gaussian(3, 4, seed=3)
    inner = (reference.compress(G, U, V) * C).sum()
    spread = reference.expand_add(torch.zeros(9, 13, dtype=torch.float64), C, U, V)
    torch.testing.assert_close(inner, (G * spread).sum())


def test_adamw_without_projection_is_torch_adamw():
    W = gaussian(6, 8)
    parameter = torch.nn.Parameter(W.clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.7, 0.9), weight_decay=0.2)
    moments = torch.zeros_like(W), torch.zeros_like(W)
    for step in (1, 2, 3):
        parameter.grad = gaussian(6, 8, seed=step)
        optimizer.step()
        for project in ("update", "gradient"):
            new = reference.project_adamw(
                W, parameter.grad, *moments, basis(6, 0), basis(8, 0),
                project=project, lr=0.1, betas=(0.7, 0.9), weight_decay=0.2, step=step,
            )  # fmt: skip
        W, moments = new[0], new[1:]
        torch.testing.assert_close(W, parameter.detach())
