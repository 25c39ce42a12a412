"""Many clients at once, each with a picture and a stream, against a server of the demo model.

python benchmarks/serve_load.py
python benchmarks/serve_load.py --clients 1,8,64 --requests 128 --json load.json

Starts `minigpt4 serve` as a process on this machine and connects over loopback; clients and server
share the cores. Each client sends its next request as soon as it is answered, until all requests of
the round are done. Every round has new pictures, and every second request repeats a picture. first
is the time to the first text, token the time between an answer's tokens after that; memory is the
server's memory after the round.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from minigpt4_runtime.evaluation import scenes

QUESTIONS = ("Describe this image in detail.", "How many shapes are there?", "Where is the star?")
MIB = 2**20


@dataclass
class Round:
    """The results for one number of clients. Times are in seconds."""

    clients: int
    requests: int
    seconds: float = 0.0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    memory_bytes: int = 0

    def as_row(self) -> str:
        """A line of the table."""
        cells = [
            f"{self.clients}", f"{self.requests}", f"{self.requests / self.seconds:.1f}",
            f"{self.tokens / self.seconds:.0f}", *_milliseconds(self.first),
            *_milliseconds(self.per_token), f"{len(self.errors)}",
            f"{self.memory_bytes / MIB:.0f}",
        ]  # fmt: skip
        return "| " + " | ".join(cells) + " |"


def _milliseconds(times: list[float]) -> tuple[str, str]:
    if len(times) < 2:
        return "–", "–"
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return f"{cuts[49] * 1000:.0f}", f"{cuts[98] * 1000:.0f}"


def bodies(number: int, seed: str) -> list[dict[str, Any]]:
    """A number of questions, two in a row about the same image."""
    rng, asked = random.Random(seed), []
    for index in range(number):
        if index % 2 == 0:
            content = io.BytesIO()
            scenes.draw(scenes.random_scene(rng, held_out=True), rng).save(content, "PNG")
            url = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": QUESTIONS[index % len(QUESTIONS)]},
        ]
        asked.append({
            "model": "minigpt4-demo", "messages": [{"role": "user", "content": parts}],
            "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 64,
        })  # fmt: skip
    return asked


async def ask(client: httpx.AsyncClient, body: dict[str, Any], result: Round) -> None:
    """One stream, read to its end."""
    started = first = last = time.perf_counter()
    num_tokens = 0
    is_done = False
    async with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        if stream.status_code != 200:
            result.errors.append(f"status {stream.status_code}")
            return
        async for line in stream.aiter_lines():
            is_done |= line == "data: [DONE]"
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                result.errors.append(event["error"]["message"])
                return
            if event["usage"]:
                num_tokens = event["usage"]["completion_tokens"]
            elif event["choices"][0]["delta"].get("content"):
                last = time.perf_counter()
                first = last if first == started else first
    if not is_done or first == started:
        result.errors.append("the stream was cut short or empty")
        return
    result.tokens += num_tokens
    result.first.append(first - started)
    if num_tokens > 1:
        result.per_token.append((last - first) / (num_tokens - 1))


async def run_round(url: str, num_clients: int, num_requests: int) -> Round:
    """All requests of a round, by so many clients."""
    result = Round(num_clients, num_requests)
    waiting = bodies(num_requests, f"{num_clients}/{num_requests}")
    limits = httpx.Limits(max_connections=num_clients)

    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def keep_asking() -> None:
            while waiting:
                try:
                    await ask(client, waiting.pop(), result)
                except httpx.HTTPError as error:
                    result.errors.append(type(error).__name__)

        started = time.perf_counter()
        await asyncio.gather(*(keep_asking() for _ in range(num_clients)))
        result.seconds = time.perf_counter() - started
    return result


def resident_bytes(pid: int) -> int:
    """A process's memory now (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text("ascii")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found, "Linux gives VmRSS"
    return int(found[1]) * 1024


@contextmanager
def serving(*options: str, log: int | None = subprocess.DEVNULL) -> Iterator[tuple[str, int]]:
    """A server of the demo model as a process: its address and its process id.

    After the block it is terminated, and its exit status is checked unless the block failed. `log`
    None is this process's stderr.
    """
    command = [sys.executable, "-m", "minigpt4_runtime", "serve", "--port", "0",
               "--max-requests", "512", *options]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, encoding="utf-8")
    try:
        assert server.stdout
        url = server.stdout.readline().strip()
        if not url:
            raise RuntimeError(f"The server did not start. Try: {shlex.join(command)}")
        yield url, server.pid
    finally:
        server.terminate()
        status = server.wait(timeout=60)
    if status:
        raise RuntimeError(f"The server ended with status {status}.")


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", default="1,8,64,256", help="rounds, with commas")
    parser.add_argument("--requests", type=int, default=256, help="in each round, at least")
    parser.add_argument("--device", default="auto", help="what the model runs on")
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    return parser.parse_args()


def main() -> None:
    """Start the server, run the rounds, print the table."""
    args, rounds = read_arguments(), []
    with serving("--device", args.device) as (url, pid):
        asyncio.run(run_round(url, 2, 8))  # Warms it up.
        print(f"memory before: {resident_bytes(pid) / MIB:.0f} MiB")
        print("| clients | requests | requests/s | tokens/s | first p50 ms | p99 | token p50 ms | "
              "p99 | errors | MiB after |\n|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
        for num_clients in map(int, args.clients.split(",")):
            result = asyncio.run(run_round(url, num_clients, max(args.requests, 2 * num_clients)))
            result.memory_bytes = resident_bytes(pid)
            rounds.append(result)
            print(result.as_row(), flush=True)
            for error in sorted(set(result.errors)):
                print(f"  error: {error}")
    if args.json:
        args.json.write_text(json.dumps([asdict(each) for each in rounds]) + "\n", "utf-8")
    sys.exit(any(each.errors for each in rounds))


if __name__ == "__main__":
    main()
