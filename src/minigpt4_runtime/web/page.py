"""The page: a dialogue about pictures, and beside it how answers are chosen.

Owns   how it looks, and which button does what.
Takes  the server that answers and pictures to try; gives a Gradio app.
Never  computes an answer, and loads nothing from elsewhere: no font, no script, no share link.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.messages import TASK_NAMES
from minigpt4_runtime.optional import require
from minigpt4_runtime.web.actions import FIRST_QUESTION, Actions, Growing, Shown
from minigpt4_runtime.web.controls import add_controls
from minigpt4_runtime.web.dialogue import Server
from minigpt4_runtime.web.guard import OnFailure, PageGuard, PlacesOnly
from minigpt4_runtime.web.upload_room import TidyParser, UploadRoom
from minigpt4_runtime.web.uploads import Uploads, fetch_nothing

if TYPE_CHECKING:
    from fastapi import FastAPI
    from gradio import Blocks

gradio = require("gradio", extra="web")

TITLE = "MiniGPT-4"
MAX_IMAGE_BYTES = 32 * 2**20
MAX_KEPT_BYTES = 2**30
# How often Gradio deletes old uploads, and from what age on.
_KEPT_SECONDS = (600, 3600)
# Gradio looks for questions a thousand times a second: 5 % of a core while none comes.
_POLL_SECONDS = 0.02
# Image types that browsers and Python may not know; the server decides whether it reads them.
_OTHER_SUFFIXES = [".heic", ".heif", ".avif", ".jp2", ".jxl"]
_HERE = Path(__file__).parent
_SCRIPTS = ("page.js", "boxes.js", "heat.js")
_KEEPING = (
    "The dialogue stays in this browser until you clear it, with up to 16 MiB of its pictures. "
    "Markdown holds the words, JSON the pictures too."
)


@dataclass(frozen=True)
class _Components:
    """The components that events use; `shown` in the order of Actions' outputs."""

    about: Any
    task: Any
    clicked: Any
    look: Any
    heat: Any
    growing: Any
    shown: Shown
    controls: list[Any]
    colour: Any


def build_page(server: Server, images: Sequence[Path]) -> Blocks:
    """Make the page, with pictures to try."""
    with gradio.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=_KEPT_SECONDS
    ) as page:
        components = _lay_out()
        shown = components.shown
        examples = _add_examples(shown.dialogue, images)
        actions = Actions(server, Uploads(shown.question), examples)
        _connect_asking(components, actions)
        _connect_browser(components)
        _connect_looking(components, actions)
        # In turn: begun together, the first was once seen to end without an effect.
        page.load(
            actions.restore, [shown.kept, shown.turns], list(shown),
            js="() => chatPage.restore()", show_progress="hidden",
        ).then(
            actions.about, None,
            [components.about, components.controls[0], components.task, components.look],
            show_progress="hidden",
        )  # fmt: skip
    # The server itself limits the number of answers.
    page.queue(default_concurrency_limit=None, api_open=False)
    page._queue.sleep_when_free = _POLL_SECONDS  # noqa: SLF001 - nothing public sets it.
    return page  # type: ignore[no-any-return]


def mount(
    app: FastAPI,
    page: Blocks,
    *,
    on_failure: OnFailure,
    max_image_bytes: int = MAX_IMAGE_BYTES,
    max_kept_bytes: int = MAX_KEPT_BYTES,
) -> None:
    """Show the page at / of an application, behind the guards of that.

    `on_failure` is told of every unexpected error; Gradio itself prints none.
    """
    # Without it Gradio would accept any file of this machine as an upload.
    page.has_launched = True
    fonts = ["system-ui", "sans-serif"]
    gradio.mount_gradio_app(
        app,
        page,
        path="/",
        theme=gradio.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
        # As `css=` Gradio would put its own name before each selector.
        head=f"<style>{_read('page.css')}</style>"
        + "".join(f"<script>{_read(name)}</script>" for name in _SCRIPTS),
        footer_links=[],
        max_file_size=max_image_bytes,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,  # It would keep questions and pictures in the browser.
    )
    for module in (gradio.queueing, gradio.routes, gradio.route_utils):
        module.traceback = PlacesOnly(on_failure)
    gradio.processing_utils.async_ssrf_protected_download = fetch_nothing
    gradio.route_utils.GradioMultiPartParser = TidyParser
    route: Any = app.routes[-1]
    route.app = PageGuard(
        route.app,
        max_image_bytes=max_image_bytes,
        room=UploadRoom(max_bytes=max_kept_bytes, seconds=sum(_KEPT_SECONDS)),
        on_failure=on_failure,
    )


def _lay_out() -> _Components:
    """The dialogue with its buttons, and the controls beside it or, on a phone, below it."""
    # page.js keeps it through a reload. It must be in the page, but is hidden.
    kept = gradio.Textbox(visible="hidden", elem_id="kept")
    clicked, heat = (gradio.Textbox(visible="hidden", elem_id=name) for name in ("clicked", "heat"))
    # Where the server explains it is in the page, but hidden.
    look = gradio.Button("Look", visible=False, elem_id="look")
    with gradio.Row(equal_height=False):
        with gradio.Column(scale=3, min_width=320, elem_id="left"):
            gradio.Markdown(f"# {TITLE}")
            about = gradio.Markdown(elem_id="about")
            dialogue, question = _add_dialogue(), _add_question()
            task = gradio.Dropdown(
                ["", *TASK_NAMES], value="", label="Task", visible=False, elem_id="task",
                info="Its word goes before the question. To ask about a part of the picture above, "
                "drag a box on it.",
            )  # fmt: skip
            with gradio.Row(elem_id="buttons"):
                buttons = [_add_button(name) for name in ("Stop", "Retry", "Undo", "Clear")]
        with gradio.Column(scale=1, min_width=300):
            with gradio.Accordion("How answers are chosen", elem_id="settings"):
                controls = add_controls()
            with gradio.Row():
                saves = [_add_button("Save .md"), _add_button("Save .json")]
            gradio.Markdown(_KEEPING, elem_id="keeping")
            colour = gradio.Button("Light or dark", size="sm", elem_id="colour")
    return _Components(
        about=about,
        task=task,
        clicked=clicked,
        look=look,
        heat=heat,
        growing=gradio.State(Growing()),
        shown=Shown(dialogue, gradio.State([]), question, kept, *buttons, *saves),
        controls=controls,
        colour=colour,
    )


def _connect_asking(components: _Components, actions: Actions) -> None:
    """Connect the events that ask the server, and the buttons that end an answer."""
    shown, outputs = components.shown, list(components.shown)
    so_far = [components.growing, shown.turns]
    asking = []
    for begins, act, asked in (
        (shown.question.submit, actions.ask, [shown.question, components.task]),
        (shown.retry.click, actions.retry, []),
        (shown.dialogue.edit, actions.edit, []),
    ):
        inputs = [*so_far, *asked, *components.controls]
        # "once" would drop what is asked before the browser knows that the last answer has ended.
        asking.append(begins(act, inputs, outputs, show_progress="hidden", trigger_mode="multiple"))
        begins(None, js="() => chatPage.showAnswer()")
    for button, ending in (
        (shown.stop, actions.stop), (shown.undo, actions.undo), (shown.clear, actions.clear)
    ):  # fmt: skip
        button.click(ending, so_far, outputs, cancels=asking, show_progress="hidden")
    shown.dialogue.example_select(
        actions.take_example, shown.question, shown.question, show_progress="hidden"
    )


def _connect_looking(components: _Components, actions: Actions) -> None:
    """Connect a click on a word, which heat.js makes one on the hidden button."""
    components.look.click(
        actions.look, [components.clicked, components.shown.turns], components.heat,
        js="(_, turns) => [chatHeat.clicked(), turns]", show_progress="hidden",
    )  # fmt: skip
    components.heat.change(None, components.heat, js="(heat) => chatHeat.show(heat)")


def _connect_browser(components: _Components) -> None:
    """Connect the events that page.js handles without the server."""
    kept, (_, system, *_) = components.shown.kept, components.controls
    kept.change(None, kept, js="(kept) => chatPage.keep(chatHeat.keep(chatBoxes.show(kept)))")
    components.shown.save_markdown.click(None, kept, js="(kept) => chatPage.saveMarkdown(kept)")
    components.shown.save_json.click(
        None, [kept, system], js="(kept, system) => chatPage.saveJson(kept, system)"
    )
    components.colour.click(None, js="() => chatPage.changeColour()")


def _add_dialogue() -> Any:
    return gradio.Chatbot(
        label="Dialogue", show_label=False, elem_id="dialogue", buttons=["copy"],
        editable="user",
        # Gradio can edit no message that has pictures in the same bubble.
        group_consecutive_messages=False,
        allow_file_downloads=False, latex_delimiters=[], feedback_options=None,
        placeholder="Drop pictures into the box below, or click one, and ask about them.",
    )  # fmt: skip


def _add_question() -> Any:
    return gradio.MultimodalTextbox(
        FIRST_QUESTION, label="Your question", show_label=False, placeholder="Your question",
        file_types=["image", *_OTHER_SUFFIXES], file_count="multiple", submit_btn="Ask",
        # Gradio would make a file of a longer text that is pasted.
        max_plain_text_length=2**20, max_lines=6, elem_id="question",
    )  # fmt: skip


def _add_examples(dialogue: Any, images: Sequence[Path]) -> list[Path]:
    """Show pictures to try in the empty dialogue; gives where Gradio keeps them."""
    examples = [Path(dialogue.move_resource_to_block_cache(str(each))) for each in images]
    dialogue.keep_in_cache.update(map(str, examples))
    dialogue.examples = [
        {"text": f"Picture {number}", "icon": dialogue.serve_static_file(str(path))}
        for number, path in enumerate(examples, 1)
    ]
    return examples


def _add_button(name: str) -> Any:
    """A button, which is enabled once there is a dialogue."""
    return gradio.Button(
        name, interactive=False, size="md", min_width=64,
        elem_id=name.lower().replace(" .", "-"),
    )  # fmt: skip


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
