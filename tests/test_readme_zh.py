"""The Chinese README shows what the English one shows."""

import re
from pathlib import Path

import pytest

from minigpt4_runtime.checkpoint.sizes import running_bytes, weight_bytes
from minigpt4_runtime.checkpoint.weights import show_bytes
from minigpt4_runtime.presets import PRESETS

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "README.zh-CN.md")
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in NAMES)


def blocks_of(text):
    return re.findall(r"^```\w*\n.*?^```", text, flags=re.DOTALL | re.MULTILINE)


def test_code_blocks_are_equal():
    assert blocks_of(ENGLISH)
    assert blocks_of(CHINESE) == blocks_of(ENGLISH)


def test_headings_are_as_many_and_of_the_same_depth():
    depths = [
        re.findall(r"^#+(?= )", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE),
                   flags=re.MULTILINE)
        for text in (ENGLISH, CHINESE)
    ]  # fmt: skip
    assert depths[0] == depths[1]


def test_links_lead_to_the_same_places():
    """In any order, but for the links from one language to the other."""
    links = [
        {target for target in re.findall(r"\]\(([^)]+)\)", text) if target not in NAMES}
        for text in (ENGLISH, CHINESE)
    ]
    assert links[0] == links[1]


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=NAMES)
def test_sizes_are_those_that_the_shapes_give(text):
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| ([\w, ]+) \| ([\d.]+ GiB) \| ([\d.]+ GiB) \|$", text,
                      flags=re.MULTILINE)  # fmt: skip
    assert {row[0] for row in rows} == set(PRESETS)
    shown = {
        (preset, dtype): (on_disk, in_memory)
        for preset, dtypes, on_disk, in_memory in rows
        for dtype in dtypes.split(", ")
    }
    computed = {
        (preset, dtype): (
            show_bytes(weight_bytes(preset, dtype)),
            show_bytes(running_bytes(preset, dtype)),
        )
        for preset in PRESETS
        for dtype in ("float16", "bfloat16", "float32")
    }
    assert shown == computed
