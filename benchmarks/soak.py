"""A long random load that looks for leaks, hangs and changed answers.

python benchmarks/soak.py --requests 5000

Many threads send all kinds of requests to the demo model: pictures, dialogues, beams, sampling.
They cancel answers, drop them unread, and send prompts that are too long and invalid pictures. The
cache is too small for all of them, so that answers are preempted. Exits with 1 unless every request
ends as expected, all blocks are free, memory is flat, and repeated requests give the same answers.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import os
import platform
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from minigpt4_runtime import (
    EngineConfig,
    Message,
    MiniGPT4,
    RequestError,
    SamplingParams,
    image,
)
from minigpt4_runtime.evaluation.scenes import draw, random_scene

NUM_READERS = 48
NUM_SCENES = 40
SECONDS_UNTIL_STUCK = 120
# How much more memory is allowed after the last tenth than after the second, which ends warm-up.
ALLOWED_GROWTH = 1.05
ASKED_AGAIN = 0.04
M_ARENA_MAX = -8  # From glibc's malloc.h.

QUESTIONS = (
    "What is in this picture?",
    "How many shapes are there?",
    "What colour is the background?",
    "What is in the centre?",
)
TOO_LONG = ("star " * 2000, "star " * 9000)
NO_PICTURE = (b"", b"GIF89a", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n" + b"\0" * 40)


@dataclass(frozen=True)
class Ask:
    """A request, its name in the table, and after how many pieces its reader stops."""

    kind: str
    messages: tuple[Message, ...]
    sampling: SamplingParams
    leaves_after: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a request ended: "stop", "length", "left" or "refused"; or, unexpectedly, an error."""

    kind: str
    how: str
    # Kept only for a few requests, which are repeated: a list of all would look like a leak.
    ask: Ask | None = None
    token_ids: tuple[int, ...] = ()


# --- what is asked ------------------------------------------------------------------------------


class Asker:
    """Draws requests at random; the same seed draws the same."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._pictures = [self._draw_picture() for _ in range(NUM_SCENES)]
        self._makers: dict[Callable[[], Ask], int] = {
            self._describe: 30, self._talk: 15, self._words_only: 5, self._sample: 15,
            self._search: 10, self._leave: 12, self._too_long: 5, self._no_picture: 5,
            self._too_many_beams: 3, self._ramble: 10,
        }  # fmt: skip

    def __call__(self) -> Ask:
        """The next request."""
        (maker,) = self._rng.choices(list(self._makers), list(self._makers.values()))
        return maker()

    def _draw_picture(self) -> bytes:
        buffer = io.BytesIO()
        draw(random_scene(self._rng, held_out=True), self._rng).save(buffer, "PNG")
        return buffer.getvalue()

    def _question(self, *, with_picture: bool = True) -> Message:
        text = self._rng.choice(QUESTIONS)
        if not with_picture:
            return Message("user", (text,))
        return Message("user", (image(self._rng.choice(self._pictures)), text))

    def _describe(self) -> Ask:
        return Ask("picture", (self._question(),), SamplingParams())

    def _talk(self) -> Ask:
        messages = [self._question()]
        for _ in range(self._rng.randint(1, 4)):
            messages.append(Message("assistant", ("One red star on white.",)))
            messages.append(self._question(with_picture=self._rng.random() < 0.2))
        return Ask("dialogue", tuple(messages), SamplingParams())

    def _words_only(self) -> Ask:
        return Ask("words only", (self._question(with_picture=False),), SamplingParams())

    def _sample(self) -> Ask:
        sampling = SamplingParams(
            temperature=self._rng.choice((0.5, 1.0, 1.5)),
            top_p=self._rng.choice((0.8, 1.0)),
            top_k=self._rng.choice((0, 5)),
            repetition_penalty=self._rng.choice((1.0, 1.2)),
            min_new_tokens=self._rng.choice((0, 8)),
            max_new_tokens=self._rng.randint(8, 60),
            seed=self._rng.randrange(2**32),
            logprobs=self._rng.choice((None, None, 3)),
            stop=self._rng.choice((None, (" and", "circle"))),
        )
        return Ask("sampled", (self._question(),), sampling)

    def _search(self) -> Ask:
        sampling = SamplingParams(
            num_beams=self._rng.randint(2, 5),
            length_penalty=self._rng.choice((-1.0, 1.0, 2.0)),
            max_new_tokens=self._rng.randint(4, 40),
        )
        return Ask("beams", (self._question(),), sampling)

    def _ramble(self) -> Ask:
        sampling = SamplingParams(
            ignore_eos=True, stop=(), max_new_tokens=self._rng.randint(20, 200)
        )
        return Ask("no end", (self._question(),), sampling)

    def _leave(self) -> Ask:
        ask = self._rng.choice((self._describe, self._talk, self._sample, self._search,
                                self._ramble))()  # fmt: skip
        return Ask("left", ask.messages, ask.sampling, leaves_after=self._rng.randint(0, 10))

    def _too_long(self) -> Ask:
        words = self._rng.choice(TOO_LONG)
        return Ask("too long", (Message("user", (words,)),), SamplingParams())

    def _no_picture(self) -> Ask:
        picture = image(self._rng.choice(NO_PICTURE))
        return Ask("no picture", (Message("user", (picture, "What is it?")),), SamplingParams())

    def _too_many_beams(self) -> Ask:
        sampling = SamplingParams(num_beams=1000)
        return Ask("too many beams", (self._question(),), sampling)


ENDS = {
    "left": {"left", "stop", "length"},
    "too long": {"refused"},
    "no picture": {"refused"},
    "too many beams": {"refused"},
}
ANSWERED = {"stop", "length"}


# --- asking -------------------------------------------------------------------------------------


def serve(model: MiniGPT4, ask: Ask) -> Ended:
    """Submit a request, and read its answer until the reader stops."""
    try:
        ticket = model.submit(ask.messages, ask.sampling)
        for number, delta in enumerate(ticket):
            if delta.reply:
                return Ended(ask.kind, delta.reply.finish_reason, ask, delta.reply.token_ids)
            if number == ask.leaves_after:
                break
        if ask.leaves_after and ask.leaves_after % 2:
            ticket.cancel()  # The others are dropped, with the same effect.
    except RequestError:
        return Ended(ask.kind, "refused")
    except Exception as error:  # noqa: BLE001 - the table must show every error.
        return Ended(ask.kind, f"{type(error).__name__}: {error}")
    return Ended(ask.kind, "left")


@dataclass
class Load:
    """The outcomes so far; `memory` is measured after each tenth of the requests."""

    ended: list[Ended]
    memory: list[int]
    num_stuck: int = 0

    def broken_ends(self) -> list[Ended]:
        """The requests that did not end as expected."""
        return [each for each in self.ended if each.how not in ENDS.get(each.kind, ANSWERED)]


def run_load(
    model: MiniGPT4, asks: Iterable[Ask], total: int, rng: random.Random, console: Console
) -> Load:
    """Run all requests, until they have ended or none ends for a long time."""
    load, remaining = Load([], []), iter(asks)
    pool = ThreadPoolExecutor(NUM_READERS)
    open_asks: set[Future[Ended]] = set()
    while True:
        while len(open_asks) < NUM_READERS and (ask := next(remaining, None)) is not None:
            open_asks.add(pool.submit(serve, model, ask))
        if not open_asks:
            break
        done, open_asks = wait(open_asks, SECONDS_UNTIL_STUCK, FIRST_COMPLETED)
        if not done:
            load.num_stuck = len(open_asks)
            break
        for future in done:
            ended = future.result()
            is_kept = rng.random() < ASKED_AGAIN
            load.ended.append(ended if is_kept else Ended(ended.kind, ended.how))
            if len(load.ended) * 10 // total > len(load.memory):
                load.memory.append(resident_bytes())
                console.print(f"{len(load.ended)} of {total} …")
    pool.shutdown(wait=not load.num_stuck)
    return load


def use_one_arena() -> None:
    """Let all threads allocate from one heap.

    glibc gives each thread a heap and keeps its freed memory; with dozens of readers that varies by
    more than the leaks to be found.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def resident_bytes() -> int:
    """This process's memory now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def ask_again(model: MiniGPT4, ended: list[Ended]) -> tuple[int, int]:
    """Repeat the kept requests one at a time; return their number, and how many answers differ."""
    kept = [(each.ask, each.token_ids) for each in ended if each.ask]
    return len(kept), sum(serve(model, ask).token_ids != ids for ask, ids in kept)


def rest() -> None:
    """Wait until the engine has dropped unread answers, and its thread has ended."""
    deadline = time.monotonic() + SECONDS_UNTIL_STUCK
    while time.monotonic() < deadline:
        if all(thread.name != "engine" for thread in threading.enumerate()):
            return
        time.sleep(0.1)


# --- showing ------------------------------------------------------------------------------------


def ends_table(load: Load) -> Table:
    """How many of each kind ended how."""
    columns = ("stop", "length", "left", "refused")
    counts = Counter((each.kind, each.how) for each in load.ended)
    broken = Counter(each.kind for each in load.broken_ends())
    table = Table("requests", "asked", *columns, "wrong end")
    for kind in dict.fromkeys(sorted(each.kind for each in load.ended)):
        asked = sum(number for (name, _), number in counts.items() if name == kind)
        cells = (asked, *(counts[kind, how] for how in columns), broken[kind])
        table.add_row(kind, *map(str, cells))
    return table


def verdicts(model: MiniGPT4, load: Load, again: tuple[int, int], wanted: int) -> Table:
    """Rows of a promise, the observed value, and whether the promise is kept."""
    stats = model.stats()
    held = stats.num_blocks - stats.num_free_blocks
    left_over = stats.num_running + stats.num_waiting
    growth = load.memory[-1] / load.memory[1] if len(load.memory) > 1 else 1.0
    megabytes = " ".join(str(round(size / 2**20)) for size in load.memory)
    table = Table("what", "seen", "well")
    for what, seen, is_well in (
        ("requests that ended", f"{len(load.ended)} of {wanted}", len(load.ended) == wanted),
        ("ended as they must", f"all but {len(load.broken_ends())}", not load.broken_ends()),
        ("stuck tickets", str(load.num_stuck), not load.num_stuck),
        ("left in the engine", str(left_over), not left_over),
        ("blocks still held", f"{held} of {stats.num_blocks}", not held),
        ("memory, MiB by tenths", megabytes, growth <= ALLOWED_GROWTH),
        ("asked again alone, changed", f"{again[1]} of {again[0]}", not again[1]),
        ("preempted", str(stats.num_preempted), stats.num_preempted > 0),
        ("tokens computed, reused", f"{stats.num_computed_tokens}, {stats.num_reused_tokens}",
         stats.num_reused_tokens > 0),
        ("pictures encoded", str(stats.num_encoded_images), stats.num_encoded_images > 0),
    ):  # fmt: skip
        table.add_row(what, seen, "yes" if is_well else "NO")
    return table


def main() -> None:
    """Ask, wait, look, and print two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-blocks", type=int, default=48, help="of 16 tokens")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    use_one_arena()
    console = Console()
    engine = EngineConfig(num_blocks=args.num_blocks, image_cache_bytes=2**16)
    model = MiniGPT4.load(device=args.device, engine=engine)
    asker = Asker(args.seed)
    started = time.perf_counter()
    load = run_load(
        model, (asker() for _ in range(args.requests)), args.requests, random.Random(args.seed),
        Console(stderr=True),
    )  # fmt: skip
    rest()
    seconds = time.perf_counter() - started
    again = (0, 0) if load.num_stuck else ask_again(model, load.ended)
    rest()
    table = verdicts(model, load, again, args.requests)
    console.print(ends_table(load), table)
    for how, number in Counter(each.how for each in load.broken_ends()).most_common(10):
        console.print(f"{number} ended with: {how}")
    console.print(f"{args.requests} requests in {seconds:.0f} s on {model.device}")
    is_well = "NO" not in table.columns[-1].cells
    sys.stdout.flush()
    # A stuck ticket's reader would keep the process from ending.
    os._exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
