"""What a model says about a few examples, before its training and behind it.

Owns   the file samples.json, with a small copy of each picture.
Takes  a Learner as it stands, examples and features; gives its likeliest words.
Never  lets an answer be much longer than the right one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.folder import TOKENIZER_NAME
from minigpt4_runtime.images.pixels import open_rgb
from minigpt4_runtime.lab.attention import Past
from minigpt4_runtime.lab.hooks import Hooks
from minigpt4_runtime.lab.keep import Keep
from minigpt4_runtime.lab.passes import run_pass
from minigpt4_runtime.report.files import read_text, write_whole
from minigpt4_runtime.report.page import thumbnail
from minigpt4_runtime.text.prompt import find_template
from minigpt4_runtime.text.tokenizer import Tokenizer
from minigpt4_runtime.tune.data import Example, TuningData
from minigpt4_runtime.tune.learner import Learner
from minigpt4_runtime.tune.together import Alone, Processes

SAMPLES_NAME = "samples.json"
_LONGEST = 128


@dataclass(frozen=True)
class Sample:
    """An example and what was said. `picture` is its last one, as a data URL, or empty."""

    place: str
    asked: str
    right: str
    picture: str
    before: str | None = None
    after: str | None = None


class Samples:
    """A few examples of some data, evenly spread, and what is said about them."""

    def __init__(
        self,
        out_dir: Path,
        model_dir: Path,
        data: TuningData,
        features: Tensor,
        *,
        count: int,
        processes: Processes | None = None,
    ) -> None:
        self._processes = processes or Alone()
        every = max(1, len(data.examples) // max(1, count))
        self._examples = data.examples[::every][:count]
        self._path, self._pictures, self._features = out_dir / SAMPLES_NAME, data.pictures, features
        self._tokenizer = Tokenizer(model_dir / TOKENIZER_NAME)
        config = load_config(model_dir)
        self._stops = find_template(config.template).stops
        self._context = config.language.context_length

    def take(
        self,
        when: Literal["before", "after"],
        learner: Learner,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Let the learner answer and keep that. What was kept of the same examples stays.

        All processes do the same, since each may hold a share of the weights; the first writes.

        Raises:
            ConfigError: the file cannot be written.
        """
        samples = self._kept()
        if self._processes.least(all(getattr(each, when) is not None for each in samples)):
            return
        for index, example in enumerate(self._examples):
            if not self._processes.least(not should_stop()):
                break
            said = self.answer(learner, example)
            samples[index] = replace(samples[index], **{when: said})
        if self._processes.rank:
            return
        content = json.dumps([asdict(each) for each in samples], ensure_ascii=False, indent=1)
        write_whole(self._path, content + "\n")

    def _kept(self) -> list[Sample]:
        fresh = [self._fresh(each) for each in self._examples]
        kept = read_samples(self._path)
        is_same = [replace(each, before=None, after=None) for each in kept] == fresh
        return kept if is_same else fresh

    def _fresh(self, example: Example) -> Sample:
        shown = "".join(thumbnail(open_rgb(self._pictures[n])) for n in example.pictures[-1:])
        return Sample(example.place, example.text, example.answer, shown)

    @torch.no_grad()
    def answer(self, learner: Learner, example: Example) -> str:
        """The likeliest words, up to where the model ends or twice the length of the right ones."""
        length = len(example.prompt_ids)
        room = min(2 * len(example.answer_ids), _LONGEST, self._context - length)
        rows, past, ids = self._embed(learner, example), Past(), []
        for _ in range(room):
            done = run_pass(
                learner.language, rows[None],
                hooks=Hooks(len(learner.language.layers)), keep=Keep(), past=past,
            )  # fmt: skip
            likeliest = int(learner.language.logits(done.rows[0, -1:]).argmax(-1))
            ids.append(self._processes.least(likeliest))
            text = self._tokenizer.decode(ids)
            ends = [text.index(stop) for stop in self._stops if stop in text]
            if ids[-1] == self._tokenizer.eos_id or ends:
                return text[: min(ends, default=None)].strip()
            rows, past = (
                learner.language.embed(torch.tensor(ids[-1:], device=rows.device)),
                done.past,
            )
        return f"{self._tokenizer.decode(ids).strip()} …"

    def _embed(self, learner: Learner, example: Example) -> Tensor:
        """A prompt → (T, C) rows, with its pictures as the learner projects them."""
        device = learner.image_end.projection.weight.device
        words = learner.language.embed(torch.tensor(example.prompt_ids, device=device))
        if not example.pictures:
            return words
        shown = learner.image_end(self._features[list(example.pictures)].to(device))
        for place, rows in zip(example.places, shown, strict=True):
            words[place : place + len(rows)] = rows.to(words.dtype)
        return words


def read_samples(path: Path) -> list[Sample]:
    """Those of a file; none where there is none, or it is damaged."""
    if not path.is_file():
        return []
    try:
        return [Sample(**each) for each in json.loads(read_text(path))]
    except (ValueError, TypeError):
        return []
