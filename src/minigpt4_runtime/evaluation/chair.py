"""CHAIR: which objects a caption names that are not in its picture.

By Rohrbach et al., "Object Hallucination in Image Captioning", arXiv:1809.02156.

Owns   the finding of objects in a text, and the layouts of captions and of COCO's annotations.
Takes  the published list of objects and their synonyms, which decides the numbers, and files.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.evaluation.answers import read_json_lines
from minigpt4_runtime.evaluation.asking import read_json
from minigpt4_runtime.report.files import read_text

# The published script's own rules: a baby bird is no person, and a passenger train neither.
_AGES, _ANIMALS = ("baby", "adult"), (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "animal", "cub",
)  # fmt: skip
_VEHICLES = ("jet", "train")
_PAIRS = {"bow tie": "tie", "toilet seat": "toilet"}
_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "people", "feet": "foot",
    "mice": "mouse", "geese": "goose", "oxen": "ox", "knives": "knife", "calves": "calf",
    "policemen": "policeman", "gentlemen": "gentleman",
}  # fmt: skip


class Mention(NamedTuple):
    """A word of a text, in singular, and the object of COCO that it stands for."""

    word: str
    object: str


@dataclass(frozen=True)
class Caption:
    """A caption of COCO's picture with that number, and the picture's name where it is known."""

    image_id: int
    text: str
    image: str = ""


class ObjectWords:
    """The words that name COCO's objects."""

    def __init__(self, synonyms: Sequence[Sequence[str]]) -> None:
        """Each object's own name first, then its synonyms."""
        self._object_of = {word: words[0] for words in synonyms for word in words}
        pairs = {word: word for word in self._object_of if word.count(" ") == 1}
        pairs |= {f"{age} {animal}": animal for age in _AGES for animal in _ANIMALS}
        pairs |= {f"passenger {vehicle}": vehicle for vehicle in _VEHICLES}
        self._pairs = pairs | _PAIRS
        self._known = {part for word in (*self._object_of, *self._pairs) for part in word.split()}

    @classmethod
    def read(cls, path: Path) -> ObjectWords:
        """Read the published list: an object a line, its names divided by commas.

        Raises:
            ConfigError: it is no such list.
        """
        lines = [line.split(",") for line in read_text(path).splitlines() if line.strip()]
        words = [[name for each in line if (name := each.strip())] for line in lines]
        if not all(words) or not any(line[0] == "person" for line in words):
            raise ConfigError(
                f"{path} is no list of objects: a line for each, such as 'person, girl, boy'. Take "
                "data/synonyms.txt of github.com/LisaAnne/Hallucination."
            )
        return cls(words)

    def object_of(self, name: str) -> str | None:
        """The object that a name or a synonym stands for."""
        return self._object_of.get(name)

    def find(self, text: str) -> list[Mention]:
        """The objects that a text names, in its order, with repeats."""
        words = [self._singular(word) for word in split_words(text)]
        joined: list[str] = []
        at = 0
        while at < len(words):
            pair = self._pairs.get(" ".join(words[at : at + 2]))
            joined.append(pair or words[at])
            at += 2 if pair else 1
        if "toilet" in joined:  # Its seat is no chair, however it is said.
            joined = [word for word in joined if word != "seat"]
        return [Mention(word, self._object_of[word]) for word in joined if word in self._object_of]

    def _singular(self, word: str) -> str:
        """The first form of a word that the list knows."""
        return next((form for form in _forms(word) if form in self._known), word)


def split_words(text: str) -> list[str]:
    """The words of a text in small letters; what stands between them is left out."""
    return re.findall(
        r"[^\W_]+(?:[-'][^\W_]+)*", text.lower().replace("\u2019s", "").replace("'s", "")
    )


def _forms(word: str) -> Iterator[str]:
    yield word
    yield _IRREGULAR.get(word, word)
    for end, instead in (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", "")):
        if word.endswith(end) and len(word) > len(end) + 1:
            yield word.removesuffix(end) + instead


def finished_part(text: str) -> str:
    """A text up to its last full stop, as of a caption that was cut by its length."""
    return text[: text.rfind(".") + 1]


def read_captions(path: Path) -> tuple[Caption, ...]:
    """Read captions: {image_id, caption} a line or as a list, or what `describe --out` wrote.

    Raises:
        ConfigError: a record is no caption, or a picture has two.
    """
    captions: dict[int, Caption] = {}
    for place, record in _records(path):
        name, text = record.get("image", ""), record.get("caption", record.get("answer"))
        if "image" in record and text is None:
            continue  # A picture that could not be described.
        given_id = record.get("image_id", name)
        image_id = coco_id(given_id) if isinstance(given_id, str) else given_id
        if not isinstance(image_id, int) or isinstance(image_id, bool) or not isinstance(text, str):
            raise ConfigError(f"{place} has no image_id and caption. Give records with both.")
        if image_id in captions:
            raise ConfigError(f"{path} has two captions of picture {image_id}. Give one run.")
        captions[image_id] = Caption(image_id, text, name)
    if not captions:
        raise ConfigError(f"{path} holds no caption.")
    return tuple(captions.values())


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    content = read_json(path)
    if isinstance(content, list):
        for number, record in enumerate(content, start=1):
            yield f"Caption {number} of {path}", record if isinstance(record, dict) else {}
        return
    for number, record in read_json_lines(path, "caption", may_be_cut=True):
        yield f"Line {number} of {path}", record


def coco_id(name: str) -> int | None:
    """The number in a name as COCO's: COCO_val2014_000000016631.jpg is 16631. None without one."""
    digits = re.findall(r"\d+", re.split(r"[\\/]", name)[-1])
    return int(digits[-1]) if digits else None


def read_objects(
    instances: Sequence[Path],
    captions: Sequence[Path],
    words: ObjectWords,
    image_ids: Collection[int],
) -> dict[int, frozenset[str]]:
    """The objects in these pictures, by COCO's segments and by what people wrote about them.

    Raises:
        ConfigError: a file has another layout.
    """
    found: dict[int, set[str]] = {}
    for path in instances:
        content = _annotations(path, "categories", "annotations")
        names = {each["id"]: words.object_of(each["name"]) for each in content["categories"]}
        if unknown := [each["name"] for each in content["categories"] if not names[each["id"]]]:
            raise ConfigError(f"{path} names {unknown[0]!r}, which the list of objects lacks.")
        for each in content["annotations"]:
            found.setdefault(each["image_id"], set()).add(names[each["category_id"]] or "")
    for path in captions:
        for each in _annotations(path, "annotations")["annotations"]:
            objects = found.setdefault(each["image_id"], set())
            if each["image_id"] in image_ids:  # Millions of words are read for nothing else.
                objects |= {mention.object for mention in words.find(each["caption"])}
    return {image_id: frozenset(found[image_id]) for image_id in image_ids if image_id in found}


def read_image_order(captions: Sequence[Path]) -> list[int]:
    """The numbers of the pictures in COCO's files of captions, in their order.

    Raises:
        ConfigError: a file has another layout.
    """
    return [each["id"] for path in captions for each in _annotations(path, "images")["images"]]


def _annotations(path: Path, *keys: str) -> Mapping[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise ConfigError(
            f"{path} has no lists of {' and '.join(keys)}. Give COCO's instances with --instances "
            "and its captions with --captions."
        )
    return content
