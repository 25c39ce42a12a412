"""Recipes: how a published run asked, decoded and cut its answers, as a file with its sources.

Owns   the form of a recipe, the choice of pictures by its seed, and the cuts.
Takes  the name of a bundled recipe or the path of a file; gives a Run for a task.
Never  asks a model.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.evaluation.asking import IMAGE_PLACE
from minigpt4_runtime.evaluation.chair import finished_part
from minigpt4_runtime.report.files import read_text

RECIPES_DIR = Path(__file__).with_name("recipes")
TASKS = ("captions", "pope", "mme", "choice")
Item = TypeVar("Item")

_SAMPLING = (
    "max_new_tokens", "num_beams", "temperature", "top_p", "top_k", "repetition_penalty",
    "length_penalty", "seed",
)  # fmt: skip
_PICTURES = ("pictures", "pictures_seed", "pictures_drawn", "pictures_order")
_OTHERS = ("prompt", "prompt_later", "reading", "cut")


def _after_assistant(text: str) -> str:
    return text.split("Assistant:")[-1].strip()


def _without_unk(text: str) -> str:
    return ".".join(part for part in text.split(".") if "unk" not in part)


# What published scripts do with an answer, by a name of ours:
#   after-assistant  what follows the last "Assistant:" alone
#   without-unk      without the parts between full stops that contain "unk"
#   finished         without what follows the last full stop
CUTS: dict[str, Callable[[str], str]] = {
    "after-assistant": _after_assistant,
    "without-unk": _without_unk,
    "finished": finished_part,
}


@dataclass(frozen=True)
class PictureChoice:
    """Which pictures of a folder a run took.

    `drawn` is Python's `random.shuffle`, of which the first `count` are taken, or `random.sample`.
    `order` is that of what is drawn from: of file names, or of COCO's file of captions.
    """

    count: int
    seed: int
    drawn: Literal["shuffle", "sample"] = "shuffle"
    order: Literal["names", "annotations"] = "names"

    def choose(self, items: Sequence[Item]) -> list[Item]:
        """That many of the items, which are in `order`; all of them if there are no more."""
        lot = random.Random(self.seed)
        if len(items) <= self.count:
            return list(items)
        if self.drawn == "sample":
            return lot.sample(items, self.count)
        shuffled = list(items)
        lot.shuffle(shuffled)
        return shuffled[: self.count]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One task of a published run. `{question}` stands in the prompt for the question.

    `prompt_later` is how the questions of a raw dialogue are put that come after the first.
    `told` is what a report says of the run, and of what differs from it.
    """

    prompt: str
    sampling: SamplingParams
    reading: str = "first-sentence"
    cut: tuple[str, ...] = ()
    prompt_later: str | None = None
    pictures: PictureChoice | None = None
    differs: tuple[str, ...] = ()
    told: str = ""

    @property
    def is_raw(self) -> bool:
        """Whether the prompt says where the picture stands, and so has its own template."""
        return IMAGE_PLACE in self.prompt

    def trim(self, answer: str) -> str:
        """An answer as the run went on with it."""
        for name in self.cut:
            answer = CUTS[name](answer)
        return answer

    def altered(self, typed: Run, usual: Run) -> tuple[Run, tuple[str, ...]]:
        """This run with what is typed and not `usual` in its stead, and the names of that."""
        parts = {
            name: getattr(typed, name)
            for name in ("prompt", "reading")
            if getattr(typed, name) != getattr(usual, name)
        }
        names = [field.name for field in fields(SamplingParams)]
        chosen = {
            name: getattr(typed.sampling, name)
            for name in names
            if getattr(typed.sampling, name) != getattr(usual.sampling, name)
        }
        sampling = replace(self.sampling, **chosen)
        return replace(self, **parts, sampling=sampling), (*parts, *chosen)


@dataclass(frozen=True)
class Recipe:
    """A published run: where it is from, and its tasks."""

    name: str
    source: str
    runs: Mapping[str, Run]

    @classmethod
    def read(cls, name: str) -> Recipe:
        """Read a bundled recipe by its name, or a file by its path.

        Raises:
            ConfigError: there is none, or it is not in the form of a recipe.
        """
        bundled = RECIPES_DIR / f"{name}.toml"
        path = bundled if "/" not in name and bundled.is_file() else Path(name)
        if not path.is_file():
            known = ", ".join(sorted(each.stem for each in RECIPES_DIR.glob("*.toml")))
            raise ConfigError(f"There is no recipe {name}. Give {known}, or the path of a .toml.")
        try:
            table = tomllib.loads(read_text(path))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not TOML: {error}.") from None
        source = table.pop("source", None)
        if not isinstance(source, str) or not table or not all(each in TASKS for each in table):
            raise ConfigError(
                f"{path} needs a source and tables of the tasks {', '.join(TASKS)}, no others."
            )
        runs = {task: _read_run(part, f"{task} of {path}") for task, part in table.items()}
        return cls(path.stem, source, runs)

    def run(self, task: str) -> Run:
        """What it says of a task.

        Raises:
            ConfigError: nothing.
        """
        if task not in self.runs:
            raise ConfigError(
                f"The recipe {self.name} says nothing of {task}, only of {', '.join(self.runs)}."
            )
        return self.runs[task]


def _read_run(table: Any, place: str) -> Run:
    if not isinstance(table, dict):
        raise ConfigError(f"{place} is {table!r}; it must be a table of settings.")
    differs = tuple(_sourced(each, "differs", place) for each in table.pop("differs", []))
    given = {name: _sourced(each, name, place) for name, each in table.items()}
    if strays := sorted(given.keys() - {*_SAMPLING, *_PICTURES, *_OTHERS}):
        known = ", ".join((*_OTHERS, *_SAMPLING, *_PICTURES, "differs"))
        raise ConfigError(f"{place} has {strays[0]!r}, which is no setting. There are {known}.")
    prompt, cut = given.get("prompt"), given.get("cut", [])
    if not isinstance(prompt, str) or "max_new_tokens" not in given:
        raise ConfigError(f"{place} needs a prompt, as text, and max_new_tokens.")
    if not isinstance(cut, list) or not all(each in CUTS for each in cut):
        raise ConfigError(f"{place}: cut is {cut!r}; it must be a list of {', '.join(CUTS)}.")
    return Run(
        prompt=prompt,
        sampling=SamplingParams(**{name: given[name] for name in _SAMPLING if name in given}),
        reading=str(given.get("reading", "first-sentence")),
        cut=tuple(cut),
        prompt_later=given.get("prompt_later"),
        pictures=_read_pictures(given, place),
        differs=tuple(map(str, differs)),
    )


def _sourced(entry: Any, name: str, place: str) -> Any:
    """The value of { value = …, source = "…" }."""
    if not isinstance(entry, dict) or entry.keys() != {"value", "source"} or not entry["source"]:
        raise ConfigError(
            f'{place}: {name} is {entry!r}. Write {{ value = …, source = "where that is from" }}.'
        )
    return entry["value"]


def _read_pictures(given: Mapping[str, Any], place: str) -> PictureChoice | None:
    if not any(name in given for name in _PICTURES):
        return None
    count, seed = given.get("pictures"), given.get("pictures_seed")
    drawn, order = given.get("pictures_drawn"), given.get("pictures_order")
    numbers = all(isinstance(each, int) and each >= 0 for each in (count, seed))
    if not numbers or drawn not in ("shuffle", "sample") or order not in ("names", "annotations"):
        raise ConfigError(
            f"{place}: a choice of pictures is pictures and pictures_seed as whole numbers, "
            "pictures_drawn shuffle or sample, and pictures_order names or annotations."
        )
    return PictureChoice(*cast(tuple[int, int, Any, Any], (count, seed, drawn, order)))
