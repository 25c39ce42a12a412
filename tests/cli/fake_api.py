"""Stands for minigpt4_runtime.api without torch: a model that says what it was asked and shown.

It keeps to the contract: wrong input is refused before the first delta, a picture is really
opened, the last delta carries the reply. Run as a script it is the command with this model:
`python fake_api.py describe cat.png`. FAKE_SECONDS is its time for a word.
"""

import itertools
import os
import sys
import time
import types
from pathlib import Path
from typing import ClassVar

import minigpt4_runtime
from minigpt4_runtime.errors import ConfigError, PromptTooLongError, RequestError
from minigpt4_runtime.images.pixels import open_rgb
from minigpt4_runtime.messages import (
    Described,
    ImageSource,
    Reply,
    TextDelta,
    Usage,
    image,
    read_messages,
)
from minigpt4_runtime.text.boxes import find_boxes

CONTEXT = 200


class FakeMiniGPT4:
    loaded: ClassVar[list] = []  # What `load` was called with, newest last.
    raw: ClassVar[list] = []  # Raw prompts with their sampling, newest last.
    device = "cpu"
    has_boxes = False

    def __init__(self, dtype="float32"):
        self.dtype = dtype

    @classmethod
    def load(cls, model=None, *, device="auto", dtype="auto", tensor_parallel=1, **settings):
        if dtype not in ("auto", "float32", "float16", "bfloat16"):
            raise ConfigError(f"dtype is {dtype!r}")
        cls.loaded.append((model, device, dtype))
        return cls("float32" if dtype == "auto" else dtype)

    def submit(self, messages, sampling=None):
        """Refuses at once what cannot be served; `stream` here would wait for the first delta."""
        deltas = self.stream(messages, sampling)
        first = next(deltas)
        return itertools.chain([first], deltas)

    def describe(self, picture, prompt, sampling=None):
        source = picture if isinstance(picture, ImageSource) else image(picture)
        return self.chat([{"role": "user", "content": [source, prompt]}], sampling)

    def submit_raw(self, text, pictures, sampling=None):
        type(self).raw.append((text, sampling))
        return self.submit([{"role": "user", "content": [*pictures, text]}], sampling)

    def describe_all(self, pictures, prompt, sampling=None, *, task=None, is_raw=False):
        """One after the other; asked "backwards", from the last to the first."""
        prompt = f"[{task}] {prompt}" if task else prompt
        numbered = list(enumerate(pictures))
        for index, picture in reversed(numbered) if prompt == "backwards" else numbered:
            started = time.perf_counter()
            try:
                if is_raw:
                    type(self).raw.append((prompt, sampling))
                reply, error = self.describe(picture, prompt, sampling), None
            except RequestError as failure:
                reply, error = None, failure
            yield Described(index, reply, error, time.perf_counter() - started)

    def chat(self, messages, sampling=None):
        return list(self.stream(messages, sampling))[-1].reply

    def stream(self, messages, sampling=None):
        turns = read_messages(messages)
        parts = [part for turn in turns for part in turn.content]
        names = [part.name.split("/")[-1] for part in parts if isinstance(part, ImageSource)]
        num_tokens = sum(len(part.split()) for part in parts if isinstance(part, str))
        if num_tokens >= CONTEXT:
            raise PromptTooLongError(num_tokens, CONTEXT)
        size = None
        for part in parts:
            if isinstance(part, ImageSource):
                size = open_rgb(part).size
        question = turns[-1].content[-1]
        question = f"[{turns[-1].task}] {question}" if turns[-1].task else question
        if question == "crash":
            raise KeyError("crash")
        answer = f"{question} {'+'.join(names)} turn {len(turns)}"
        if question.startswith("say "):
            answer = question.removeprefix("say ").replace("|", "\n")
        shown = size if self.has_boxes else None
        return self._answer(answer, num_tokens, shown, fails=question.startswith("overflow"))

    def _answer(self, answer, num_tokens, shown, *, fails):
        words = answer.split(" ")
        for number, word in enumerate(words):
            if fails and number == 2:
                raise RequestError("The model's numbers overflowed.")
            time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
            yield TextDelta(word if number == 0 else f" {word}")
        boxes = find_boxes(answer, shown) if shown else ()
        usage = Usage(num_tokens, len(words))
        yield TextDelta("", Reply(answer, (1,), "stop", usage, None, boxes, shown))


def environment(**more):
    """What a process needs to find the package from any folder."""
    source_dir = str(Path(minigpt4_runtime.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source_dir, **{key: str(more[key]) for key in more}}


def as_module():
    module = types.ModuleType("minigpt4_runtime.api")
    module.MiniGPT4 = FakeMiniGPT4
    return module


if __name__ == "__main__":
    from minigpt4_runtime.cli.main import run

    sys.modules["minigpt4_runtime.api"] = as_module()
    run()
