"""Sparsemax against an independent projection, and its Jacobian."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.model.sparsemax import sparsemax

rows = st.lists(st.floats(-50, 50), min_size=1, max_size=9)


def project(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """The projection onto the simplex by bisection on its threshold: no sorting, no support."""
    low, high = z.max() - 1, z.max()
    for _ in range(200):
        middle = (low + high) / 2
        if np.maximum(z - middle, 0).sum() > 1:
            low = middle
        else:
            high = middle
    return np.maximum(z - (low + high) / 2, 0)


@given(rows)
def test_is_the_projection_onto_the_simplex(row: list[float]) -> None:
    z = np.array(row)
    np.testing.assert_allclose(sparsemax(torch.tensor(z)).numpy(), project(z), atol=1e-12)


@given(rows, st.floats(-1e4, 1e4))
def test_a_constant_shift_changes_nothing(row: list[float], shift: float) -> None:
    z = torch.tensor(row, dtype=torch.float64)
    torch.testing.assert_close(sparsemax(z + shift), sparsemax(z), atol=1e-9, rtol=0)


def test_ties_share_and_one_class_is_certain() -> None:
    assert sparsemax(torch.tensor([2.0, 2.0, -1.0])).tolist() == [0.5, 0.5, 0.0]
    assert sparsemax(torch.zeros(3, 4)).tolist() == [[0.25] * 4] * 3
    assert sparsemax(torch.tensor([[-7.0], [1e30]])).tolist() == [[1.0], [1.0]]


def test_implausible_classes_are_exactly_zero() -> None:
    assert sparsemax(torch.tensor([3.0, 1.9, 0.0])).tolist() == [1.0, 0.0, 0.0]


@given(st.integers(0, 2**16), st.integers(1, 7))
def test_gradient_is_the_exact_jacobian(seed: int, classes: int) -> None:
    z = torch.randn(classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(sparsemax, z)
    inside = (sparsemax(z) > 0).double()
    torch.testing.assert_close(jacobian, inside.diag() - inside.outer(inside) / inside.sum())


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 4), (3, 1)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    z = torch.randn(
        shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True
    )
    assert torch.autograd.gradcheck(sparsemax, z)


def test_gradcheck_at_a_tie_inside_the_support() -> None:
    assert torch.autograd.gradcheck(sparsemax, torch.tensor([1.0, 1.0, -5.0]).double().requires_grad_())


def test_vmap_and_functional_gradients() -> None:
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(torch.func.vmap(sparsemax)(z), sparsemax(z))
    per_row = torch.func.vmap(torch.func.grad(lambda row: sparsemax(row).square().sum()))(z)
    leaf = z.clone().requires_grad_()
    sparsemax(leaf).square().sum().backward()
    torch.testing.assert_close(per_row, leaf.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_of_any_size(dtype: torch.dtype) -> None:
    z = torch.tensor([[60000.0, 59968.0, 0.0], [0.5, 0.25, -0.25]], dtype=dtype)
    p = sparsemax(z)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p, sparsemax(z.double()).float())
    torch.testing.assert_close(p.sum(1), torch.ones(2))


def test_under_autocast() -> None:
    z = torch.tensor([[0.5, 0.25, -0.25]], dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sparsemax(z), sparsemax(z.float()))


def test_a_row_with_nan_gives_nan_and_leaves_the_others_alone() -> None:
    scores = torch.tensor([[torch.nan, 1.0, 2.0], [0.0, 0.0, 5.0]])
    result = sparsemax(scores)
    assert result[0].isnan().all()
    assert result[1].tolist() == [0.0, 0.0, 1.0]
