"""A dialogue as the browser keeps it through a reload.

Owns   the form in which turns go to the browser and come back; page.js stores it.
Takes  turns; gives text, and turns again.
Never  trusts the returned text: it may be damaged, or of another version of this page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from minigpt4_runtime.web.dialogue import DialogueError, Turn


class _KeptTurn(BaseModel, extra="forbid", strict=True, frozen=True):
    """A turn; a picture is the path of its upload, or None where the browser could not keep it."""

    question: str
    answer: str
    pictures: tuple[str | None, ...]
    model: str = ""
    system: str = ""


class _KeptDialogue(BaseModel, extra="forbid", strict=True, frozen=True):
    version: Literal[1]
    turns: tuple[_KeptTurn, ...]


def write_kept(turns: Sequence[Turn]) -> str:
    """The turns as text for the browser; empty without turns."""
    if not turns:
        return ""
    kept = tuple(
        _KeptTurn(
            question=turn.question,
            answer=turn.answer,
            pictures=tuple(map(str, turn.images)),
            model=turn.model,
            system=turn.system,
        )
        for turn in turns
    )
    return _KeptDialogue(version=1, turns=kept).model_dump_json()


def read_kept(text: str, find_image: Callable[[str], Path | None]) -> tuple[tuple[Turn, ...], int]:
    """The turns that the browser kept, and how many of their images are gone.

    Raises:
        DialogueError: the text is damaged or of another version of the page.
    """
    try:
        kept = _KeptDialogue.model_validate_json(text)
    except ValidationError:
        raise DialogueError(
            "The dialogue that this browser kept is damaged or of another version of this page. "
            "It was dropped; ask anew."
        ) from None
    turns, num_missing = [], 0
    for turn in kept.turns:
        found = [find_image(name) if name else None for name in turn.pictures]
        images = tuple(filter(None, found))
        num_missing += len(found) - len(images)
        turns.append(Turn(turn.question, images, turn.answer, turn.model, turn.system))
    return tuple(turns), num_missing
