"""Pictures' rows are kept as far as the bytes go, the latest used the longest."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt4_runtime.cache.image_cache import ImageCache


def rows(num_bytes):
    return torch.zeros(num_bytes, dtype=torch.uint8)


def kept(cache, names="abcd"):
    """The names that are still there. Looking them up makes the last one the latest used."""
    return "".join(name for name in names if cache.get(name) is not None)


def test_what_was_put_is_found_and_nothing_else():
    cache, picture = ImageCache(100), rows(10)
    cache.put("a", picture)
    assert cache.get("a") is picture
    assert cache.get("b") is None


def test_what_is_too_much_pushes_out_the_oldest():
    cache = ImageCache(20)
    for name in "abc":
        cache.put(name, rows(10))
    assert kept(cache) == "bc"
    assert cache.num_bytes == 20


def test_what_was_looked_up_stays_longer():
    cache = ImageCache(20)
    for name in "ab":
        cache.put(name, rows(10))
    cache.get("a")
    cache.put("c", rows(10))
    assert kept(cache) == "ac"


def test_what_was_put_again_stays_longer():
    cache = ImageCache(20)
    for name in "abac":
        cache.put(name, rows(10))
    assert kept(cache) == "ac"


def test_one_large_picture_pushes_out_as_many_as_it_takes():
    cache = ImageCache(30)
    for name in "abc":
        cache.put(name, rows(10))
    cache.put("d", rows(15))
    assert kept(cache) == "cd"
    assert cache.num_bytes == 25


def test_another_picture_of_a_digest_takes_the_place_of_the_first():
    cache, second = ImageCache(20), rows(5)
    cache.put("a", rows(20))
    cache.put("a", second)
    assert cache.get("a") is second
    assert cache.num_bytes == 5


def test_a_picture_larger_than_the_cache_is_not_kept():
    cache = ImageCache(20)
    cache.put("a", rows(21))
    assert kept(cache) == ""
    assert cache.num_bytes == 0
    cache.put("b", rows(20))
    assert kept(cache) == "b"


def test_bytes_count_and_not_rows():
    cache = ImageCache(20)
    cache.put("a", torch.zeros(5, dtype=torch.float32))
    assert cache.num_bytes == 20
    cache.put("b", torch.zeros(1, dtype=torch.float16))
    assert kept(cache) == "b"


PUTS = st.tuples(st.sampled_from("abcd"), st.integers(0, 12))
LOOKUPS = st.tuples(st.sampled_from("abcd"), st.none())


@given(st.lists(PUTS | LOOKUPS, max_size=30))
def test_the_latest_used_are_kept_as_far_as_the_bytes_go(uses):
    cache, latest = ImageCache(20), {}  # The latest used last.
    for name, num_bytes in uses:
        if num_bytes is None:
            found = cache.get(name)
            assert (found is not None) == (name in latest)
            if name in latest:
                latest[name] = latest.pop(name)
            continue
        cache.put(name, rows(num_bytes))
        latest.pop(name, None)
        latest[name] = num_bytes
        while sum(latest.values()) > 20:
            del latest[next(iter(latest))]
        assert cache.num_bytes == sum(latest.values())
