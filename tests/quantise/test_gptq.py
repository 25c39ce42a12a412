"""GPTQ and SparseGPT against derivations of their own, column by column, and plain rounding."""

import pytest
import torch

from minigpt4_runtime.formats.integer import INTEGER_FORMATS
from minigpt4_runtime.formats.sparse import SPARSE_FORMATS
from minigpt4_runtime.quantise.gptq import prune_by_inputs, round_by_inputs

NAMES = ["w8a16", "w4a16-g32", "w4a16-g64-asymmetric", "w4a8-g32"]


def draw(seed, out_features=16, in_features=192, rows=400):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    sizes = torch.rand(in_features, generator=generator) ** 3 + 0.01
    inputs = torch.randn(rows, in_features, generator=generator) @ (mixing + torch.eye(in_features))
    return torch.randn(out_features, in_features, generator=generator), inputs * sizes


def derived(weight, products, chosen, grid):
    """Optimal brain quantisation of one row at a time, in float64, without a factorisation.

    After a column is rounded, the least square of the product's change is reached by moving all
    columns that are left by  -(w - q) / [F⁻¹]₀₀ · [F⁻¹]₀ , where F is the matrix of products over
    the columns that are left; F⁻¹ is computed anew for each column.
    """
    products = products.double()
    products = products + 0.01 * products.diagonal().mean() * torch.eye(len(products))
    order = products.diagonal().argsort(descending=True).tolist()
    size = weight.shape[1] // grid.scale.shape[1]
    low, high = chosen.limits
    integers = torch.zeros(weight.shape, dtype=torch.int8)
    rests = [order[place:] for place in range(len(order))]
    firsts = [torch.linalg.inv(products[left][:, left])[0] for left in rests]
    for number, row in enumerate(weight.double()):
        row = row.clone()
        for column, left, first in zip(order, rests, firsts, strict=True):
            scale = float(grid.scale[number, column // size])
            zero = (
                0.0 if grid.zero_point is None else float(grid.zero_point[number, column // size])
            )
            whole = min(max(round(float(row[column]) / scale + zero), low), high)
            error = float(row[column]) - (whole - zero) * scale
            integers[number, column] = whole
            row[left] -= error / first[0] * first
    return integers


@pytest.mark.parametrize("name", NAMES)
def test_integers_are_those_of_the_derivation(name):
    chosen = INTEGER_FORMATS[name]
    weight, inputs = draw(seed=3, out_features=8)
    products = inputs.T @ inputs
    integers, grid = round_by_inputs(weight, products, chosen)
    wanted = derived(weight, products, chosen, grid)
    # A tie may fall to either side in float32, and moves what comes after it.
    assert (integers == wanted).float().mean() > 0.98
    assert int((integers.int() - wanted.int()).abs().max()) <= 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_the_product_is_nearer_than_by_plain_rounding(name, seed):
    chosen = INTEGER_FORMATS[name]
    weight, inputs = draw(seed)
    truth = inputs @ weight.T
    found = chosen.store(*round_by_inputs(weight, inputs.T @ inputs, chosen))
    errors = [
        float((inputs @ chosen.unpack(parts).T - truth).square().mean())
        for parts in (found, chosen.pack(weight))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_inputs_that_never_come_and_too_few_of_them():
    chosen = INTEGER_FORMATS["w4a16-g32"]
    weight, inputs = draw(seed=1, rows=5)
    inputs[:, 7:40] = 0
    parts = chosen.store(*round_by_inputs(weight, inputs.T @ inputs, chosen))
    found = chosen.unpack(parts)
    assert found.isfinite().all()
    assert float((inputs @ found.T - inputs @ weight.T).abs().max()) < 1
    assert float((found - weight).abs().max()) < 3


def test_pruning_is_that_of_the_derivation():
    """As above; in every four columns the two with the smallest w² / [F⁻¹]₀₀ are lost.

    SparseGPT takes [F⁻¹]₀₀ of each of the four as if those before it were settled.
    """
    weight, inputs = draw(seed=3, out_features=8, in_features=64)
    products = (inputs.T @ inputs).double()
    products = products + 0.01 * products.diagonal().mean() * torch.eye(64)
    firsts = [torch.linalg.inv(products[place:, place:])[0] for place in range(64)]
    wanted = weight.double().clone()
    for row in wanted:
        for place in range(64):
            if place % 4 == 0:
                costs = [float(row[place + i] ** 2 / firsts[place + i][0]) for i in range(4)]
                lost = sorted(range(4), key=costs.__getitem__)[:2]
            if place % 4 in lost:
                row[place:] -= row[place] / firsts[place][0] * firsts[place]
                row[place] = 0
    found = prune_by_inputs(weight, inputs.T @ inputs)
    assert (found.view(8, -1, 4) == 0).sum(-1).eq(2).all()
    assert torch.allclose(found.double(), wanted, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_the_product_is_nearer_than_by_keeping_the_largest(seed):
    weight, inputs = draw(seed)
    truth = inputs @ weight.T
    chosen = SPARSE_FORMATS["w8a16-sparse24"]
    pruned = chosen.pack(prune_by_inputs(weight, inputs.T @ inputs))
    errors = [
        float((inputs @ chosen.unpack(parts).T - truth).square().mean())
        for parts in (pruned, chosen.pack(weight))
    ]
    assert errors[0] < 0.5 * errors[1]
