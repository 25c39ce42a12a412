"""A dialogue that never ends: fifty pictures, one a turn, within a window.

python benchmarks/long_dialogue.py
python benchmarks/long_dialogue.py --turns 200 --window 256 --through api --blocks 64

The demo model is asked about a new picture in every turn, and each request has the whole dialogue,
through the API and through a server of its own. A row for every ten turns: pictures encoded so far,
and pictures that have left; tokens computed in a turn, the median and the most; the share of all
tokens that the prefix cache had; the largest share of the cache's blocks that was held; memory of
the process beside that after ten turns; and the time of a turn as a multiple of the first ten. Then
one answer far longer than the window, beside one that ends within it: the time of a token.
Exits with 1 unless each picture was encoded once and no turn computed more than the window.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from rich.console import Console
from rich.table import Table

from minigpt4_runtime import MiniGPT4, SamplingParams
from minigpt4_runtime.evaluation.scenes import draw, random_scene
from minigpt4_runtime.server import listen
from minigpt4_runtime.server.app import create_app
from minigpt4_runtime.server.settings import ServerConfig

QUESTION = "What is in this picture?"
MOST_NEW = 60
PER_ROW = 10
NAME = "demo"
# The question and its picture, and the tokens of an answer: a turn may compute so many more.
ALLOWED_BEYOND = 160

# Gives the answer to a dialogue, and how many pictures have left it.
Ask = Callable[[list[dict[str, Any]]], tuple[str, int]]


@dataclass(frozen=True)
class Turn:
    """What one turn has cost, and the state after it."""

    seconds: float
    num_computed: int
    num_reused: int
    num_encoded: int
    num_left: int
    held_share: float
    memory_bytes: int


# --- how it is asked ----------------------------------------------------------------------------


def ask_api(model: MiniGPT4) -> Ask:
    """Through `MiniGPT4.chat`."""

    def ask(dialogue: list[dict[str, Any]]) -> tuple[str, int]:
        reply = model.chat(dialogue, SamplingParams(max_new_tokens=MOST_NEW))
        return reply.text, reply.usage.evicted_images

    return ask


@contextmanager
def ask_server(model: MiniGPT4, num_turns: int) -> Iterator[Ask]:
    """Through a server in this process, which is told to take so many pictures."""
    listener = listen.bind("127.0.0.1", 0)
    app = create_app(model, ServerConfig(model_name=NAME, max_images=num_turns))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with httpx.Client(base_url=listen.url_of(listener), timeout=120) as client:

            def ask(dialogue: list[dict[str, Any]]) -> tuple[str, int]:
                body = {"model": NAME, "messages": dialogue, "max_tokens": MOST_NEW}
                answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
                left = answer["usage"].get("evicted_images", 0)
                return str(answer["choices"][0]["message"]["content"]), int(left)

            yield ask
    finally:
        server.should_exit = True
        thread.join()


# --- the dialogue -------------------------------------------------------------------------------


def draw_pictures(count: int) -> list[str]:
    """So many different pictures, as data URLs."""
    rng, urls = random.Random(0), []
    for _ in range(count):
        buffer = io.BytesIO()
        draw(random_scene(rng, held_out=True), rng).save(buffer, "PNG")
        urls.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    return urls


def converse(model: MiniGPT4, ask: Ask, pictures: list[str]) -> list[Turn]:
    """Ask about one picture after the other in one dialogue."""
    dialogue: list[dict[str, Any]] = []
    turns = []
    for url in pictures:
        shown = {"type": "image_url", "image_url": {"url": url}}
        content = [shown, {"type": "text", "text": QUESTION}]
        dialogue.append({"role": "user", "content": content})
        before, started = model.stats(), time.perf_counter()
        with watching(model) as most_held:
            text, num_left = ask(dialogue)
        seconds, after = time.perf_counter() - started, model.stats()
        dialogue.append({"role": "assistant", "content": text})
        turns.append(
            Turn(
                seconds,
                after.num_computed_tokens - before.num_computed_tokens,
                after.num_reused_tokens - before.num_reused_tokens,
                after.num_encoded_images,
                num_left,
                most_held() / after.num_blocks,
                memory_bytes(),
            )
        )
    return turns


@contextmanager
def watching(model: MiniGPT4) -> Iterator[Callable[[], int]]:
    """The largest number of blocks that were held at a look, every few milliseconds."""
    held, is_over = [0], threading.Event()

    def look() -> None:
        while not is_over.wait(0.005):
            stats = model.stats()
            held[0] = max(held[0], stats.num_blocks - stats.num_free_blocks)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: held[0]
    finally:
        is_over.set()
        thread.join()


def memory_bytes() -> int:
    """What this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def add_rows(table: Table, name: str, turns: list[Turn]) -> None:
    """A row for each ten turns."""
    first = turns[:PER_ROW]
    first_seconds = statistics.median(turn.seconds for turn in first)
    for start in range(0, len(turns), PER_ROW):
        some = turns[start : start + PER_ROW]
        computed = [turn.num_computed for turn in some]
        reused = sum(turn.num_reused for turn in some)
        table.add_row(
            name, str(start + len(some)), str(some[-1].num_encoded), str(some[-1].num_left),
            f"{statistics.median(computed):.0f}", str(max(computed)),
            f"{reused / (reused + sum(computed)):.0%}",
            f"{max(turn.held_share for turn in some):.0%}",
            f"{some[-1].memory_bytes / first[-1].memory_bytes:.2f}",
            f"{statistics.median(turn.seconds for turn in some) / first_seconds:.2f}",
        )  # fmt: skip


# --- one long answer ----------------------------------------------------------------------------


def seconds_per_token(model: MiniGPT4, num_tokens: int) -> tuple[float, float]:
    """The time of a token and the tokens computed for it, in an answer of so many tokens."""
    sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True, stop=())
    before, started = model.stats().num_computed_tokens, time.perf_counter()
    reply = model.chat([{"role": "user", "content": QUESTION}], sampling)
    seconds = time.perf_counter() - started
    computed = model.stats().num_computed_tokens - before
    return seconds / len(reply.token_ids), computed / len(reply.token_ids)


def compare_answers(window: int, rounds: int) -> tuple[float, float]:
    """An answer of ten windows beside one that just fits: time of a token; tokens computed."""
    with (
        MiniGPT4.load(device="cpu", engine={"cache_window": window}) as sliding,
        MiniGPT4.load(device="cpu") as plain,
    ):
        ratios, computed = [], 0.0
        for _ in range(rounds):
            within, _ = seconds_per_token(plain, window)
            beyond, computed = seconds_per_token(sliding, 10 * window)
            ratios.append(beyond / within)
    return statistics.median(ratios), computed


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--blocks", type=int, help="Of the cache; as many as fit without it")
    parser.add_argument("--through", choices=("api", "server"), nargs="+")
    parser.add_argument("--rounds", type=int, default=5, help="Of the long answer; 0 leaves it out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(
        "through", "turns", "encoded", "left", "computed a turn", "at most", "from the cache",
        "blocks held", "memory", "time",
    )  # fmt: skip
    is_right, pictures = True, draw_pictures(args.turns)
    for name in args.through or ("api", "server"):
        engine = {"cache_window": args.window, "num_blocks": args.blocks}
        with MiniGPT4.load(device="cpu", engine=engine) as model:
            if name == "api":
                turns = converse(model, ask_api(model), pictures)
            else:
                with ask_server(model, args.turns) as ask:
                    turns = converse(model, ask, pictures)
        add_rows(table, name, turns)
        most = max(turn.num_computed for turn in turns)
        is_right &= turns[-1].num_encoded == args.turns and most <= args.window + ALLOWED_BEYOND
    console = Console(width=140)
    console.print(table)
    if args.rounds:
        ratio, computed = compare_answers(args.window, args.rounds)
        console.print(
            f"A token of an answer of 10 windows takes {ratio:.2f} times as long as one of an "
            f"answer that fits; {computed:.1f} tokens are computed for it."
        )
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
