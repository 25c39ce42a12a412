"""What rows get from the adapters that they chose, against a loop over the rows."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_runtime.model.adapter import Adapter, AdapterChoice, Factors
from minigpt4_runtime.model.linear import Linear


def one_by_one(factors, rows, chosen):
    """The twin: each row by the `Adapter` of its number alone."""
    added = torch.zeros(len(rows), len(next(iter(factors.values())).high))
    for index, number in enumerate(chosen.tolist()):
        if number in factors:
            low, high, scale = factors[number]
            adapter = Adapter(low.shape[1], len(high), rank=len(low), scale=scale)
            adapter.load_state_dict({"low": low, "high": high})
            added[index] = adapter(rows[index : index + 1])[0].detach()
    return added


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_each_row_gets_its_own(data):
    numbers = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True))
    ranks = data.draw(st.lists(st.integers(1, 5), min_size=len(numbers), max_size=len(numbers)))
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=7)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    factors = {
        number: Factors(
            torch.randn(rank, 11, generator=generator),
            torch.randn(7, rank, generator=generator),
            0.5 * number,
        )
        for number, rank in zip(numbers, ranks, strict=True)
    }
    rows = torch.randn(len(chosen), 11, generator=generator)
    expected = one_by_one(factors, rows, chosen)
    choice = AdapterChoice(factors)
    assert torch.allclose(choice(rows, chosen), expected, atol=1e-4)
    assert choice.num_bytes == 4 * sum(ranks) * (11 + 7)
    # What a row gets does not depend on the rows beside it, not even where those overflow.
    beside = torch.cat([rows, torch.full((1, 11), 3e38)])
    last = torch.tensor([numbers[0]])
    assert torch.allclose(choice(beside, torch.cat([chosen, last]))[:-1], expected, atol=1e-4)


@torch.no_grad()
def test_a_linear_adds_it_to_what_it_adds_to_all_rows():
    torch.manual_seed(0)
    linear = Linear(6, 5, bias=True)
    linear.adapt(2, 4.0)
    for weight in linear.parameters():
        torch.nn.init.normal_(weight)
    rows, chosen = torch.randn(3, 6), torch.tensor([0, 1, 0])
    plain = linear(rows)
    assert torch.equal(linear(rows, chosen), plain)
    factors = {1: Factors(torch.randn(2, 6), torch.randn(5, 2), 3.0)}
    linear.choice = AdapterChoice(factors)
    assert torch.equal(linear(rows), plain)
    assert torch.allclose(
        linear(rows, chosen) - plain, one_by_one(factors, rows, chosen), atol=1e-4
    )
