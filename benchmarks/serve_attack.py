"""The cost of hostile clients to a server of the demo model: slow bodies, and dropped streams.

python benchmarks/serve_attack.py bodies
python benchmarks/serve_attack.py streams --requests 10000 --clients 16

Starts `minigpt4 serve` as a process on this machine. `bodies` sends a list of bodies within the
limit on bytes, while another process requests /health every 5 ms. It prints the longest response
time, and the server's additional memory as a multiple of the body; it exits with 1 if either is
more than promised. `streams` asks about pictures over and over, disconnects after the first text,
and prints the server's memory after each tenth of the requests. Each tenth has new pictures, whose
embeddings the server keeps up to EngineConfig.image_cache_bytes; with --same-images all tenths have
the same ones, so that the memory comes to rest if nothing else is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import multiprocessing
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
from serve_load import MIB, bodies, resident_bytes

BODY_BYTES = 31 * MIB
PATH = "/v1/chat/completions"
MOST_STALLED_SECONDS = 0.1
MOST_TIMES_ITS_SIZE = 5
# Smaller bodies vanish in the usual changes of the process's memory.
SMALL = 8 * MIB


@contextmanager
def serving(*options: str) -> Iterator[tuple[str, int]]:
    """A running server: its URL and process id."""
    command = [sys.executable, "-m", "minigpt4_runtime.cli.main", "serve", "--port", "0", *options]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
    )
    try:
        assert server.stdout
        yield server.stdout.readline().strip(), server.pid
    finally:
        server.terminate()
        server.wait(timeout=60)


# --- bodies -------------------------------------------------------------------------------------


def hostile_bodies() -> dict[str, bytes]:
    """Bodies within the limit on bytes, each of which is slow for one step of the server."""
    key, message = b'"%d":1', b'{"model":"minigpt4-demo","messages":[%s]}'
    keys = b"{" + b",".join(key % number for number in range(2_600_000)) + b"}"
    some_keys = b"{" + b",".join(key % number for number in range(6_600)) + b"}"
    part = b'{"type":"image_url","image_url":{"url":"%s"}}'
    user = b'{"role":"user","content":[%s]}'
    picture = b"data:image/png;base64," + b"A" * BODY_BYTES
    noise = base64.b64encode(random.Random(0).randbytes(BODY_BYTES * 3 // 4))
    slashes = b"data:image/png;base64," + (b"A" * 63 + b"\\/") * (BODY_BYTES // 65)
    numbers = user % b",".join([b"1"] * 250)
    return {
        "a question": message % (user % b'{"type":"text","text":"hi"}'),
        "many keys": keys,
        "many keys in a message": message % keys,
        "as many keys as may be": message % some_keys,
        "as many items as may be": message % b",".join([numbers] * 38),
        "brackets": b"[" * BODY_BYTES,
        "closing brackets": b"]" * BODY_BYTES,
        "quotes": b'"' * BODY_BYTES,
        "blanks": b"{" + b" " * BODY_BYTES + b"}",
        "digits": b'{"seed":' + b"1" * BODY_BYTES + b"}",
        "text": message % (b'{"role":"user","content":"%s"}' % (b"a" * BODY_BYTES)),
        "as much text as may be": message
        % (b'{"role":"user","content":"%s"}' % ("é" * (4 * MIB)).encode()),
        "escapes": b'{"model":"' + b"\\u00e9" * (BODY_BYTES // 6) + b'"}',
        "as many escapes as may be": b'{"model":"' + b'\\"' * 524_000 + b'"}',
        "a picture of nothing": message % (user % (part % picture)),
        "a picture of noise": message % (user % (part % (b"data:image/jpeg;base64,/9j/" + noise))),
        "a picture with escapes": message % (user % (part % slashes)),
        "a picture of another kind": message % (user % b'{"type":"%s"}' % picture),
    }


def watch_health(url: str, told: Connection) -> None:
    """Request /health over and over; on request report the longest time since the last report."""
    longest = 0.0
    with httpx.Client(base_url=url, timeout=120) as client:
        client.get("/health")
        told.send(0.0)
        while True:
            started = time.perf_counter()
            client.get("/health")
            longest = max(longest, time.perf_counter() - started)
            if told.poll():
                if told.recv() == "end":
                    return
                told.send(longest)
                longest = 0.0
            time.sleep(0.005)


def peak_bytes(pid: int) -> int:
    """A process's peak memory since `forget_peak` (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text("ascii"))
    assert found, "Linux gives VmHWM"
    return int(found[1]) * 1024


def forget_peak(pid: int) -> None:
    """Reset the peak to the present memory."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", "ascii")


def measure_bodies() -> bool:
    """Send every body three times and print the worst values; return whether promises are kept."""
    is_well = True
    with serving() as (url, pid), httpx.Client(base_url=url, timeout=120) as client:
        ours, theirs = multiprocessing.Pipe()
        watching = multiprocessing.Process(target=watch_health, args=(url, theirs))
        watching.start()
        ours.recv()
        print("| body | MiB | status | s | /health, longest, ms | memory, MiB | times its size |\n"
              "|---|---|---|---|---|---|---|")  # fmt: skip
        for name, body in hostile_bodies().items():
            stalled = seconds = 0.0
            grown = status = 0
            for _ in range(3):
                ours.send("tell")
                ours.recv()
                before = resident_bytes(pid)
                forget_peak(pid)
                started = time.perf_counter()
                headers = {"Content-Type": "application/json"}
                status = client.post(PATH, content=body, headers=headers).status_code
                seconds = max(seconds, time.perf_counter() - started)
                grown = max(grown, peak_bytes(pid) - before)
                ours.send("tell")
                stalled = max(stalled, ours.recv())
            times = grown / max(len(body), SMALL)
            is_well &= stalled <= MOST_STALLED_SECONDS and times <= MOST_TIMES_ITS_SIZE
            print(
                f"| {name} | {len(body) / MIB:.1f} | {status} | {seconds:.2f} | "
                f"{stalled * 1000:.0f} | {grown / MIB:.0f} | {times:.1f} |", flush=True,
            )  # fmt: skip
        ours.send("end")
        watching.join()
    return is_well


# --- streams ------------------------------------------------------------------------------------


async def drop_one(url: str, body: dict[str, object]) -> None:
    """Ask for a stream and leave after its first text."""
    async with (
        httpx.AsyncClient(base_url=url, timeout=120) as client,
        client.stream("POST", PATH, json=body) as stream,
    ):
        async for line in stream.aiter_lines():
            if line.startswith("data: {") and '"content":""' not in line:
                return


async def drop_many(url: str, number: int, num_clients: int, seed: str) -> None:
    """Drop so many streams, over pictures of their own."""
    waiting = bodies(number, seed)

    async def keep_dropping() -> None:
        while waiting:
            await drop_one(url, waiting.pop())

    await asyncio.gather(*(keep_dropping() for _ in range(num_clients)))


def measure_streams(num_requests: int, num_clients: int, *, is_same: bool) -> bool:
    """Print the server's memory after each tenth of the requests."""
    with serving() as (url, pid):
        asyncio.run(drop_many(url, 16, 2, "warm-up"))
        held = [resident_bytes(pid)]
        for tenth in range(10):
            seed = "every tenth" if is_same else f"tenth {tenth}"
            asyncio.run(drop_many(url, num_requests // 10, num_clients, seed))
            held.append(resident_bytes(pid))
            print(
                f"{(tenth + 1) * num_requests // 10} dropped: {held[-1] / MIB:.0f} MiB", flush=True
            )
        with httpx.Client(base_url=url) as client:
            counts = client.get("/metrics").text
    print("memory, MiB, before and by tenths:", *(round(size / MIB) for size in held))
    print("grown by, MiB:", *(round((b - a) / MIB, 1) for a, b in itertools.pairwise(held)))
    print(*re.findall(r"^minigpt4_(?:admitted|running|cache_blocks\S*) .*", counts, re.M), sep="\n")
    return "minigpt4_admitted 0.0" in counts


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("bodies", "streams"))
    parser.add_argument("--requests", type=int, default=10_000, help="streams to drop")
    parser.add_argument("--clients", type=int, default=16, help="that drop them at once")
    parser.add_argument("--same-images", action="store_true", help="in each tenth of the requests")
    args = parser.parse_args()
    if args.what == "bodies":
        is_well = measure_bodies()
    else:
        is_well = measure_streams(args.requests, args.clients, is_same=args.same_images)
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
