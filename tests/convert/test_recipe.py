"""Recipes: one mechanism for every weight that is made of several published tensors."""

from functools import partial

import pytest
import torch

from minigpt4_runtime.convert import recipe as room
from minigpt4_runtime.convert.recipe import Reader, Recipe, list_tensors


@pytest.fixture
def saved(tmp_path):
    """Saves tensors to a file of that name, and gives their recipes by name."""

    def save(file_name: str, **tensors: torch.Tensor) -> dict[str, Recipe]:
        path = tmp_path / file_name
        torch.save(tensors, path)
        return {each.tensors[0].name: each for each in list_tensors(path)}

    return save


def add_low_rank(scale: float, tensors):
    """A weight and an adapter's two factors, as LoRA merges them."""
    weight, low, high = tensors
    return weight + scale * (high @ low)


def test_a_tensor_alone_is_itself(saved):
    weight = torch.rand(3, 2)
    recipe = saved("a.pth", weight=weight)["weight"]
    assert (recipe.shape, recipe.dtype, recipe.source_bytes) == ((3, 2), torch.float32, 24)
    assert torch.equal(Reader().read(recipe), weight)


def test_a_constant_is_made_of_no_file():
    recipe = Recipe.joined([], lambda _: torch.ones(4))
    assert (recipe.shape, recipe.origin, recipe.source_bytes) == ((4,), "", 0)
    assert torch.equal(Reader().read(recipe), torch.ones(4))


def test_recipes_of_recipes(saved):
    """A delta's sum with its base, merged with an adapter from a third file, and cut."""
    base, delta = torch.rand(6, 4), torch.rand(6, 4)
    low, high = torch.rand(2, 4), torch.rand(6, 2)
    first = saved("base.pth", weight=base)["weight"]
    second = saved("delta.pth", weight=delta)["weight"]
    adapter = saved("adapter.pth", low=low, high=high)
    summed = Recipe.joined([second, first], sum)
    merged = Recipe.joined([summed, adapter["low"], adapter["high"]], partial(add_low_rank, 0.5))
    cut = Recipe.joined([merged], lambda tensors: tensors[0][:3])
    assert cut.shape == (3, 4)
    assert [each.path.name for each in cut.tensors] == [
        "delta.pth", "base.pth", "adapter.pth", "adapter.pth",
    ]  # fmt: skip
    assert torch.allclose(Reader().read(cut), (base + delta + 0.5 * high @ low)[:3])


def test_only_the_first_tensors_file_stays_open(saved, monkeypatch):
    """The next weight of the same shard opens only the files of its other tensors."""
    shard = saved("shard.pth", one=torch.rand(4, 4), two=torch.rand(4, 4))
    factors = {f"{name}_{side}": torch.rand(4, 4) for name in ("one", "two") for side in "ab"}
    adapter = saved("adapter.pth", **factors)
    opened, real = [], room.open_tensors
    monkeypatch.setattr(room, "open_tensors", lambda path: opened.append(path.name) or real(path))
    reader = Reader()
    for name, weight in shard.items():
        parts = [weight, adapter[f"{name}_a"], adapter[f"{name}_b"]]
        reader.read(Recipe.joined(parts, partial(add_low_rank, 1.0)))
    assert opened == ["shard.pth", "adapter.pth", "adapter.pth"]


def test_the_trial_finds_shapes_that_cannot_be_joined(saved):
    parts = saved("a.pth", weight=torch.rand(4, 4), low=torch.rand(2, 3), high=torch.rand(4, 2))
    with pytest.raises(RuntimeError):
        Recipe.joined(list(parts.values()), partial(add_low_rank, 1.0))
