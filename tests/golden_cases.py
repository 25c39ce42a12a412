"""The golden checkpoints as tests use them: what happens in a case, and what the original answered.

tests/goldens/README.md says how they were made.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from minigpt4_runtime import ImageSource, Message, MiniGPT4, Reply, SamplingParams, image

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/cases.json"))
SEARCHES = {
    "greedy": {},
    "greedy_rep1.05": {"repetition_penalty": 1.05},
    "greedy_nostop": {"stop": ()},
    "beam3": {"num_beams": 3, "stop": ()},
    "beam5_len2": {"num_beams": 5, "length_penalty": 2.0, "stop": ()},
}


@dataclass(frozen=True)
class Golden:
    """One checkpoint, what the original computed from it, and our model of it."""

    folder: Path
    model: MiniGPT4

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return dict(np.load(self.folder / "arrays.npz"))

    @cached_property
    def content(self) -> dict:
        return json.loads((self.folder / "cases.json").read_text(encoding="utf-8"))

    @cached_property
    def _played(self) -> dict[int, tuple[list[Message], list[Reply]]]:
        return {}

    @property
    def pictures(self) -> list[str]:
        return sorted(key.split("/")[0] for key in self.arrays if key.endswith("/pixels"))

    def picture(self, name: str) -> ImageSource:
        """A picture as the original sees it: one of 16 bits is clipped, which we do not."""
        path = self.folder / "images" / name
        with Image.open(path) as opened:
            return image(opened.convert("RGB") if opened.mode.startswith("I") else path)

    def sampling(self, **changes) -> SamplingParams:
        return SamplingParams(max_new_tokens=self.content["max_new_tokens"], **changes)

    def cases(self, *kinds: str) -> list[dict]:
        """The cases of these kinds, without what differs on purpose."""
        cases = [case for case in self.content["cases"] if case["kind"] in kinds]
        return [case for case in cases if not any(map(ends_in_mark, case["turns"]))]

    def play(self, case: dict) -> tuple[list[Message], list[Reply]]:
        """Go through a case once, as a user of the API would: the last question, and all replies.

        A picture after a text begins a message: within one, pictures would come first.
        """
        if case["id"] not in self._played:
            self._played[case["id"]] = self._play(case)
        return self._played[case["id"]]

    def _play(self, case: dict) -> tuple[list[Message], list[Reply]]:
        messages: list[Message] = []
        parts: list = []
        replies: list[Reply] = []
        for what, *value in events_of(case):
            if what == "image":
                if parts and isinstance(parts[-1], str):
                    messages = [*messages, Message("user", tuple(parts))]
                    parts = []
                parts.append(self.picture(value[0]))
            elif what == "ask":
                parts.append(value[0])
            else:
                asked = messages = [*messages, Message("user", tuple(parts))]
                parts = []
                if what == "answer":
                    replies.append(self.model.chat(asked, self.sampling()))
                    value = [replies[-1].text]
                messages = [*messages, Message("assistant", (value[0],))]
        return asked, replies

    def question(self, case: dict) -> list[Message]:
        """What a case of one turn asks."""
        pictures = map(self.picture, case["images"])
        return [Message("user", (*pictures, *case["turns"]))]


def ends_in_mark(text: str) -> bool:
    """The original takes a text of a user that ends so for a picture; we do not."""
    return text.endswith("</Img>")


def events_of(case: dict) -> list[list[str]]:
    """What happens in a case, in order: image, ask, answer, or a reply that is given."""
    if "events" in case:
        return case["events"]
    turns = [event for text in case["turns"] for event in (["ask", text], ["answer"])]
    return [["image", name] for name in case["images"]] + turns


def searches_of(case: dict) -> list[tuple[str, list[int]]]:
    """The searches of a case, each with the ids that the original found."""
    return [(name, ids) for name, ids in case["output_ids"].items() if name in SEARCHES]


def assert_same_ids(golden: Golden, ours: tuple[int, ...], theirs: list[int]) -> None:
    """Equal, or cut at a "###" that the original cuts only from the text and goes on after."""
    tokenizer = golden.model._tokenizer
    assert theirs[0] == tokenizer.bos_id
    assert list(ours) == theirs[1 : len(ours) + 1]
    if len(ours) < len(theirs) - 1:
        assert "###" in tokenizer.decode(ours)
        assert not any(list(ours[-len(stop) :]) == stop for stop in golden.content["stop_ids"])


def run_together(golden: Golden, *, most: int | None = None) -> None:
    """Submit cases with all their searches before any is read, and hold each to the original."""
    cases = golden.cases("single")[:most]
    tickets = [
        (golden.model.submit(golden.question(case), golden.sampling(**SEARCHES[search])), ids)
        for case in cases
        for search, ids in searches_of(case)
    ]
    for ticket, ids in tickets:
        *_, last = ticket
        assert_same_ids(golden, last.reply.token_ids, ids)
    stats = golden.model.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert (stats.num_running, stats.num_waiting) == (0, 0)
