"""`minigpt4 web`: the chat page of a server that runs already."""

from __future__ import annotations

import os
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from minigpt4_runtime.batch.finding import walk
from minigpt4_runtime.cli.options import option
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.optional import require

if TYPE_CHECKING:
    from fastapi import FastAPI

_NUM_DRAWN = 4
_MOST_IMAGES = 12
_UPLOADS_VARIABLE = "GRADIO_TEMP_DIR"

ExamplesOption = Annotated[
    Path | None,
    option(
        "DIR", "Pictures to click on the chat page. Without it a few drawn scenes.", "--pictures"
    ),
]


def web(
    *,
    url: Annotated[
        str, option("URL", "The server that answers, as `serve` prints it.")
    ] = "http://127.0.0.1:8000",
    api_key_file: Annotated[
        Path | None, option("FILE", "A file whose first key the server takes.")
    ] = None,
    host: Annotated[str, option("ADDRESS", "Where the page is.")] = "127.0.0.1",
    port: Annotated[int, option("NUMBER", "0 takes a free one, which is printed.")] = 7860,
    examples_dir: ExamplesOption = None,
) -> None:
    """Show a chat page in the browser, for a server that runs already.

    The server may run elsewhere. The URL of the page goes to stdout. `minigpt4 serve --ui` shows
    the same page and answers itself.
    """
    check_page(examples_dir)
    from fastapi import FastAPI

    from minigpt4_runtime.server import auth, listen, logs

    if not re.match(r"https?://[^/]", url):
        raise ConfigError(f"--url is {url!r}; it must begin with http:// or https:// and a host.")
    keys = auth.read_keys(api_key_file) if api_key_file else ()
    # The page uses its key for every visitor, and asks for none itself.
    if not auth.is_loopback(host):
        raise ConfigError(
            f"Everyone who reaches {host} could use this page, which asks for no key. Show it on "
            "this machine alone, or use `minigpt4 serve --ui --api-key-file FILE`."
        )
    listener, app = listen.bind(host, port), FastAPI(openapi_url=None)
    app.add_middleware(auth.NameGuard)
    logs.set_up_logs("plain")
    with chat_page(app, url.rstrip("/"), keys, examples_dir=examples_dir):
        url_here = listen.url_of(listener)
        listen.serve_until_told(app, listener, lambda: print(url_here, flush=True))


def check_page(examples_dir: Path | None) -> None:
    """Check the needs of a page before anything is loaded for it.

    Raises:
        BackendUnavailableError: Gradio is not installed.
        ConfigError: there are no pictures in the folder.
    """
    require("gradio", extra="web")
    if examples_dir is not None:
        _find_images(examples_dir)


@contextmanager
def chat_page(
    app: FastAPI,
    url: str,
    keys: Sequence[str],
    *,
    examples_dir: Path | None,
    **limits: int,
) -> Iterator[None]:
    """Show the page at / of an application, for as long as its pictures are there.

    `limits` are those of `mount`.
    """
    from minigpt4_runtime.server.logs import log_failure
    from minigpt4_runtime.web.dialogue import Server
    from minigpt4_runtime.web.page import build_page, mount

    with _private_uploads(), _example_images(examples_dir) as examples:
        page = build_page(Server(url, keys[0] if keys else None), examples)
        mount(app, page, on_failure=log_failure, **limits)
        yield


@contextmanager
def _private_uploads() -> Iterator[None]:
    """Let Gradio keep uploads in a folder that no other user of this machine can read."""
    with tempfile.TemporaryDirectory(
        prefix="minigpt4-uploads-", ignore_cleanup_errors=True
    ) as folder:
        # A folder that the user has named stays.
        is_ours = os.environ.setdefault(_UPLOADS_VARIABLE, folder) == folder
        try:
            yield
        finally:
            if is_ours:
                del os.environ[_UPLOADS_VARIABLE]


@contextmanager
def _example_images(folder: Path | None) -> Iterator[list[Path]]:
    """The first pictures of a folder; without one, scenes that are drawn for as long as needed."""
    if folder is not None:
        yield _find_images(folder)[:_MOST_IMAGES]
        return
    from minigpt4_runtime.evaluation.scenes import draw, random_scene

    with tempfile.TemporaryDirectory(prefix="minigpt4-pictures-") as drawn:
        paths = [Path(drawn) / f"{number}.png" for number in range(_NUM_DRAWN)]
        for number, path in enumerate(paths):
            rng = random.Random(number)
            draw(random_scene(rng, held_out=True), rng).save(path)
        yield paths


def _find_images(folder: Path) -> list[Path]:
    images = sorted(walk(folder, recursive=False)) if folder.is_dir() else []
    if not images:
        raise ConfigError(f"{folder} is no folder with pictures in it. Name another: --pictures.")
    return images
