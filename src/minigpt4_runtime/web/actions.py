"""The actions of the page's buttons.

Owns   the changes that each of them makes, and which of them are enabled.
Takes  the turns so far and the typed text; gives the new content of the page.
Never  builds a component, nor speaks HTTP itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4_runtime.messages import TASK_NAMES
from minigpt4_runtime.optional import require
from minigpt4_runtime.web.controls import read_controls
from minigpt4_runtime.web.dialogue import DialogueError, Server, Turn
from minigpt4_runtime.web.kept import read_kept, write_kept
from minigpt4_runtime.web.uploads import QuestionBox, Uploads

gradio = require("gradio", extra="web")

FIRST_QUESTION = "Describe this picture."
_NO_ANSWER = "*Stopped before there was an answer.*"
# As _as_chat makes them: the question with its images, and the answer.
_MESSAGES_PER_TURN = 2


class Shown(NamedTuple):
    """The components that actions change, or the new value of each.

    While an answer grows the question box is left alone: the next question may be half typed.
    """

    dialogue: Any
    turns: Any
    question: Any
    kept: Any
    stop: Any
    retry: Any
    undo: Any
    clear: Any
    save_markdown: Any
    save_json: Any


@dataclass
class Growing:
    """The answer that grows in one browser's page; the next question there ends it."""

    answer: object = None


class Actions:
    """One method for each button or event."""

    def __init__(self, server: Server, uploads: Uploads, examples: Sequence[Path]) -> None:
        self._server = server
        self._uploads = uploads
        self._examples = examples

    async def about(self) -> tuple[str, Any, Any, Any]:
        """The line under the title, the choices of a model and a task, and what looks at a word.

        The last three are there where the server has adapters, knows of tasks, and explains.
        """
        try:
            card = await self._server.model()
        except DialogueError as error:
            return str(error), *(gradio.skip() for _ in range(3))
        told = f"**{card.name}** answers. {card.description}"
        if card.explains:
            told += " Click a word of an answer to see where it looked."
        looks = gradio.update(visible="hidden" if card.explains else False)
        models = gradio.update(
            choices=list(card.names), value=card.name, visible=len(card.names) > 1
        )
        return told, models, gradio.update(visible=bool(card.tasks)), looks

    async def look(self, clicked: str, turns: list[Turn]) -> str:
        """Where a word looked, for heat.js, which gives the word's turn and character."""
        looked: dict[str, Any] = {"heat": []}
        try:
            asked = json.loads(clicked)
            before = turns[: int(asked["turn"]) + 1]
            looked = await self._server.look(before, int(asked["at"]))
        except (ValueError, KeyError, TypeError):
            pass  # It was not heat.js that asked.
        except DialogueError as error:
            _warn("Nothing to see", str(error), seconds=10)
        return json.dumps({**looked, "asked": clicked})

    def restore(self, kept: str, turns: list[Turn]) -> Shown:
        """Show the dialogue that the browser has kept, unless a new one has begun."""
        if not kept or turns:
            return _show_no_change()
        try:
            restored, num_missing = read_kept(kept, self._uploads.find)
        except DialogueError as error:
            _warn("Nothing kept", str(error))
            return _show_no_change()
        if num_missing:
            _warn(
                "Pictures not kept",
                f"{num_missing} of the pictures in this dialogue could not be kept. Upload them "
                "again to ask about them.",
            )
        return _show(restored, question=QuestionBox())

    def take_example(self, box: Any, chosen: gradio.SelectData) -> dict[str, Any]:  # type: ignore[name-defined]
        """Put an example's image into the question box, beside those that are there."""
        asked, image = self._uploads.read(box), self._examples[int(chosen.index)]
        others = tuple(each for each in asked.images if each != image)
        return replace(asked, images=(*others, image)).as_value()

    async def ask(
        self, growing: Growing, turns: list[Turn], box: Any, task: str, *controls: Any
    ) -> AsyncIterator[Shown]:
        """Ask one more question, as it stands in the question box, after the word of its task."""
        asked = self._uploads.read(box)
        text = asked.text.strip()
        # In the text, so that the dialogue keeps it. A word that is typed counts.
        if task and not text.startswith(tuple(f"[{each}]" for each in TASK_NAMES)):
            text = f"[{task}] {text}".strip()
        turn = Turn(text, asked.images)
        if growing.answer and turns[-1:] == [turn]:  # Enter was pressed twice.
            yield _show_no_change()
            return
        async for shown in self._answer(growing, [*turns, turn], controls, question=QuestionBox()):
            yield shown

    async def retry(
        self, growing: Growing, turns: list[Turn], *controls: Any
    ) -> AsyncIterator[Shown]:
        """Ask the last question again."""
        async for shown in self._answer(growing, turns, controls):
            yield shown

    async def edit(
        self,
        growing: Growing,
        turns: list[Turn],
        edited: gradio.EditData,  # type: ignore[name-defined]
        *controls: Any,
    ) -> AsyncIterator[Shown]:
        """Ask an edited question; the turns after it are dropped."""
        message = edited.index if isinstance(edited.index, int) else edited.index[0]
        number = message // _MESSAGES_PER_TURN
        again = [replace(turn, question=str(edited.value).strip()) for turn in turns[number:][:1]]
        async for shown in self._answer(growing, [*turns[:number], *again], controls):
            yield shown

    def undo(self, growing: Growing, turns: list[Turn]) -> Shown:
        """Take the last turn back, and put its question into the box."""
        growing.answer = None
        if not turns:
            return _show([])
        *before, last = turns
        return _show(before, question=QuestionBox(last.question, last.images))

    def stop(self, growing: Growing, turns: list[Turn]) -> Shown:
        """End the answer that grows, and keep its text so far."""
        growing.answer = None
        return _show(turns)

    def clear(self, growing: Growing, _: list[Turn]) -> Shown:
        """Empty the page."""
        growing.answer = None
        return _show([], question=QuestionBox(FIRST_QUESTION))

    async def _answer(
        self,
        growing: Growing,
        turns: list[Turn],
        controls: Sequence[Any],
        *,
        question: QuestionBox | None = None,
    ) -> AsyncIterator[Shown]:
        """Answer the last turn anew."""
        if not turns or not turns[-1].question:
            _warn("No question", "Type a question first.")
            # Without any value Gradio would empty everything.
            yield _show_no_change()
            return
        *before, last = turns
        last = replace(last, answer="")
        this = growing.answer = object()
        yield _show([*before, last], question=question, grows=True)
        try:
            settings = read_controls(*controls)
            last = replace(last, model=settings.model, system=settings.system)
            async with aclosing(self._server.answer([*before, last], settings)) as answers:
                async for answer in answers:
                    if growing.answer is not this:
                        return
                    last = replace(last, answer=answer)
                    yield _show_growth([*before, last])
        except DialogueError as error:
            _warn("No answer", str(error), seconds=20)
            # Put the question back into the box, so that it can be asked again.
            yield _show(before, question=QuestionBox(last.question, last.images))
        else:
            yield _show([*before, last])
        finally:
            if growing.answer is this:
                growing.answer = None


def _show(
    turns: Sequence[Turn], *, question: QuestionBox | None = None, grows: bool = False
) -> Shown:
    """The dialogue and the buttons that go with it; the question box only if one is given."""
    with_turns = gradio.update(interactive=bool(turns))
    return Shown(
        dialogue=_as_chat(turns, grows=grows),
        turns=list(turns),
        question=question.as_value() if question else gradio.skip(),
        kept=write_kept(turns),
        stop=gradio.update(interactive=grows),
        retry=with_turns,
        undo=with_turns,
        clear=with_turns,
        save_markdown=with_turns,
        save_json=with_turns,
    )


def _show_growth(turns: Sequence[Turn]) -> Shown:
    """The dialogue alone: nothing else changes while an answer grows."""
    others = (gradio.skip() for _ in Shown._fields[2:])
    return Shown(_as_chat(turns, grows=True), list(turns), *others)


def _show_no_change() -> Shown:
    return Shown(*(gradio.skip() for _ in Shown._fields))


def _as_chat(turns: Sequence[Turn], *, grows: bool) -> list[dict[str, Any]]:
    """Turns as Gradio shows them: two messages each."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        images = [{"path": str(image)} for image in turn.images]
        nothing = "…" if grows and turn is turns[-1] else _NO_ANSWER
        messages.append({"role": "user", "content": [*images, turn.question]})
        messages.append({"role": "assistant", "content": _as_markdown(turn.answer) or nothing})
    return messages


def _as_markdown(answer: str) -> str:
    """An answer as the page shows it: what MiniGPT-v2 has a box for is bold."""
    bold = re.sub(r"<p>\s*(\S.*?)\s*</p>", r"**\1**", answer, flags=re.DOTALL)
    return bold.replace("<p>", "").replace("<delim>", ", ")


def _warn(title: str, sentence: str, *, seconds: int = 5) -> None:
    gradio.Warning(sentence, duration=seconds, title=title)
