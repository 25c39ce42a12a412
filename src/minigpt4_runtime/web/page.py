"""The page: a picture, a dialogue about it, and what can be set.

Owns   how it looks and what its buttons do.
Takes  the server that answers and pictures to try; gives a Gradio app.
Never  computes an answer, and loads nothing from elsewhere: no font, no script, no share link.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.optional import require
from minigpt4_runtime.web.dialogue import INSTALL, DialogueError, Sampling, Server, Turn
from minigpt4_runtime.web.guard import OnFailure, PageGuard, PlacesOnly
from minigpt4_runtime.web.uploads import TidyParser, Uploads

if TYPE_CHECKING:
    from fastapi import FastAPI
    from gradio import Blocks

gradio = require("gradio", install=INSTALL)

TITLE = "MiniGPT-4"
FIRST_QUESTION = "Describe this picture."
MAX_PICTURE_BYTES = 32 * 2**20
MAX_KEPT_BYTES = 2**30
# How often Gradio looks for pictures that were sent to the page, and how old it lets them grow.
_KEPT_SECONDS = (600, 3600)
_CSS = """
.gradio-container { width: 100%; max-width: 70rem !important; margin: auto; }
#about { opacity: 0.75; }
/* The picture stands beside the dialogue; in it, a small one says where it came in. */
#dialogue .message img { max-height: 6rem; width: auto; }
#dialogue [aria-label="Share"], #dialogue [aria-label="Download"] { display: none; }
"""
# On a phone the picture stays in view while one scrolls to the dialogue; in what hides its overflow
# nothing can stick. Gradio would put its own name before each selector of _CSS.
# A picture may be pasted anywhere; Gradio takes one only where it is shown.
_HEAD = """
<script>
addEventListener("paste", (event) => {
  const place = document.querySelector("#picture");
  const picture = [...event.clipboardData.files].find((file) => file.type.startsWith("image/"));
  if (!place || !picture || place.contains(event.target)) return;
  const pasted = new DataTransfer();
  pasted.items.add(picture);
  const input = place.querySelector("input[type=file]");
  input.files = pasted.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
  event.preventDefault();
});
</script>
<style>
@media (max-width: 700px) {
  .gradio-container { overflow: clip !important; }
  #left { display: contents !important; }
  #picture { position: sticky !important; top: 0; z-index: 20; height: 168px !important; }
  #picture .image-container, #picture .image-frame, #picture img { max-height: 160px; }
}
</style>
"""

# What a run of the buttons shows: the dialogue, its turns, and the question still to be asked,
# which is left alone once it was taken over: the next one may be in the making.
Shown = tuple[list[dict[str, Any]], list[Turn], Any]


def build_page(server: Server, pictures: Sequence[Path]) -> Blocks:
    """Make the page, with pictures to try."""
    with gradio.Blocks(
        title=TITLE, analytics_enabled=False, fill_height=True, delete_cache=_KEPT_SECONDS
    ) as page:
        turns, growing = gradio.State([]), gradio.State(_Growing())
        gradio.Markdown(f"# {TITLE}")
        about = gradio.Markdown(elem_id="about")
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=2, min_width=280, elem_id="left"):
                picture = gradio.Image(
                    label="The picture", show_label=False, type="filepath",
                    sources=["upload", "clipboard"], height=320, elem_id="picture",
                )  # fmt: skip
                picture.preprocess = _uploaded(picture)
                if pictures:
                    gradio.Examples([[str(path)] for path in pictures], picture, label="Try one")
                settings = _settings()
            with gradio.Column(scale=3, min_width=320):
                chat = gradio.Chatbot(
                    label="Dialogue", show_label=False, height=400, elem_id="dialogue",
                    buttons=["copy"],
                    placeholder="Drop a picture, or click one, and ask about it.",
                )  # fmt: skip
                question = gradio.Textbox(
                    FIRST_QUESTION, label="Your question", submit_btn="Ask", autofocus=True,
                    elem_id="question",
                )  # fmt: skip
                with gradio.Row():
                    stop, retry, clear = (
                        gradio.Button(name, elem_id=name.lower(), min_width=80)
                        for name in ("Stop", "Retry", "Clear")
                    )
        actions = _Actions(server)
        shown = [chat, turns, question]
        asking = [
            question.submit(actions.ask, [growing, turns, question, picture, *settings], shown),
            retry.click(actions.retry, [growing, turns, *settings], shown),
        ]
        stop.click(None, cancels=asking)
        for cleared in (clear.click, chat.clear):
            cleared(actions.clear, None, [*shown, picture], cancels=asking)
        page.load(actions.about, None, about, show_progress="hidden")
    # The server itself says how many it takes.
    page.queue(default_concurrency_limit=None, api_open=False)
    return page  # type: ignore[no-any-return]


def mount(
    app: FastAPI,
    page: Blocks,
    *,
    on_failure: OnFailure,
    max_picture_bytes: int = MAX_PICTURE_BYTES,
    max_kept_bytes: int = MAX_KEPT_BYTES,
) -> None:
    """Show the page at / of an application, behind whatever guards that has.

    `on_failure` is told of every error that nobody expected; Gradio itself prints none.
    """
    # Without it Gradio takes any file of this machine for one that was uploaded.
    page.has_launched = True
    fonts = ["system-ui", "sans-serif"]
    gradio.mount_gradio_app(
        app,
        page,
        path="/",
        theme=gradio.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
        head=_HEAD,
        footer_links=[],
        max_file_size=max_picture_bytes,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,  # It would keep questions and pictures in the browser.
    )
    for module in (gradio.queueing, gradio.routes, gradio.route_utils):
        module.traceback = PlacesOnly(on_failure)
    gradio.processing_utils.async_ssrf_protected_download = _fetch_nothing
    gradio.route_utils.GradioMultiPartParser = TidyParser
    route: Any = app.routes[-1]
    route.app = PageGuard(
        route.app,
        max_picture_bytes=max_picture_bytes,
        uploads=Uploads(max_bytes=max_kept_bytes, seconds=sum(_KEPT_SECONDS)),
        on_failure=on_failure,
    )


def _settings() -> list[Any]:
    """The folded controls, in the order of Sampling's fields."""
    default = Sampling()
    with gradio.Accordion("How answers are chosen", open=False, elem_id="settings"):
        return [
            gradio.Slider(
                0, 2, default.temperature, step=0.05, label="Temperature",
                info="0 always takes the likeliest word.",
            ),
            gradio.Slider(0.05, 1, default.top_p, step=0.05, label="Top-p"),
            gradio.Slider(1, 1000, default.max_tokens, step=1, label="Longest answer, in tokens"),
            gradio.Number(
                None, precision=0, label="Seed", info="The same seed draws the same answer."
            ),
        ]  # fmt: skip


async def _fetch_nothing(*_: object, **__: object) -> str:
    """What Gradio does with an address in place of a file: it would fetch it, however large."""
    raise _not_uploaded()


def _not_uploaded() -> Exception:
    return gradio.Error(  # type: ignore[no-any-return]
        "This picture is not here. Upload it again.", duration=5, print_exception=False
    )


def _uploaded(picture: Any) -> Callable[[Any], str | None]:
    """How a picture is taken: as it was uploaded. Gradio would open any file, and write it anew."""
    folder = Path(picture.GRADIO_CACHE).resolve()

    def find(payload: Any) -> str | None:
        if payload is None:
            return None
        path = Path(payload.path or "").resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise _not_uploaded()
        return str(path)

    return find


@dataclass
class _Growing:
    """Which answer grows in one browser's page: another question there ends it."""

    answer: object = None


class _Actions:
    """What the buttons do."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def about(self) -> str:
        """The line under the title."""
        try:
            name, description = await self._server.model()
        except DialogueError as error:
            return str(error)
        return f"**{name}** answers. {description}"

    async def ask(
        self,
        growing: _Growing,
        turns: list[Turn],
        question: str,
        picture: str | None,
        *settings: Any,
    ) -> AsyncIterator[Shown]:
        """Ask one more question; a picture goes along when it is another than before."""
        if not question.strip():
            gradio.Warning("Type a question first.", duration=5, title="No question")
            yield _as_chat(turns), turns, gradio.skip()
            return
        path = Path(picture) if picture else None
        sent = [turn.picture for turn in turns if turn.picture]
        is_new = path is not None and path not in sent[-1:]
        turn = Turn(question.strip(), path if is_new else None)
        async for shown in self._answer(growing, [*turns, turn], Sampling(*settings)):
            yield shown

    async def retry(
        self, growing: _Growing, turns: list[Turn], *settings: Any
    ) -> AsyncIterator[Shown]:
        """Ask the last question again."""
        if not turns:
            gradio.Warning("There is nothing to retry yet.", duration=5, title="No question")
            yield _as_chat(turns), turns, gradio.skip()
            return
        *before, last = turns
        again = replace(last, answer="")
        async for shown in self._answer(growing, [*before, again], Sampling(*settings)):
            yield shown

    async def _answer(
        self, growing: _Growing, turns: list[Turn], sampling: Sampling
    ) -> AsyncIterator[Shown]:
        *before, last = turns
        this = growing.answer = object()
        yield _as_chat(turns), before, ""
        try:
            async with aclosing(self._server.answer(turns, sampling)) as answers:
                async for answer in answers:
                    if growing.answer is not this:
                        return
                    last = replace(last, answer=answer)
                    yield _as_chat([*before, last]), [*before, last], gradio.skip()
        except DialogueError as error:
            gradio.Warning(str(error), duration=20, title="No answer")
            # The question comes back, to be asked again when what was wrong is mended.
            yield _as_chat(before), before, last.question

    def clear(self) -> tuple[list[Any], list[Turn], str, None]:
        """An empty page."""
        return [], [], FIRST_QUESTION, None


def _as_chat(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as Gradio shows them."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if turn.picture:
            messages.append({"role": "user", "content": {"path": str(turn.picture)}})
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer or "…"})
    return messages
