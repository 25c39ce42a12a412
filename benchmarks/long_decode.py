"""Decoding at a long context compared with llama.cpp, by the format of keys and values.

python benchmarks/long_decode.py --llama PYTHON [--context 4000] [--layers 2] [--json FILE]

A model of 7B's widths with random weights, w8a8 here and Q8_0 there, answers a prompt of --context
tokens; what is measured are the new tokens per second behind it. Both sides take turns, one works
while the other waits. llama.cpp quantises keys and values with flash attention only (-ctk q8_0
-ctv q8_0 -fa on); its F16 is its default. PYTHON is as for benchmarks/quantised.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from engine import Work, decode_rate
from quantised import Llama, take_turns
from rivals import Ours, in_own_thread, wide_config

from minigpt4_runtime.bench.machine import processor_name
from minigpt4_runtime.cache.sizes import token_bytes
from minigpt4_runtime.config import CacheDTypeName

# Our format and llama.cpp's.
PAIRS: dict[CacheDTypeName, str] = {
    "float32": "F16", "float16": "F16", "int8": "Q8_0", "int4": "Q4_0",
}  # fmt: skip
WEIGHTS, THEIR_WEIGHTS = "w8a8", "Q8_0"


@dataclass(frozen=True)
class Row:
    """The rates of both sides, in tokens per second, and the memory of a token in ours."""

    cache: str
    rival: str
    context: int
    token_bytes: int
    ours: list[float]
    theirs: list[float]

    def show(self) -> str:
        """A line of the table."""
        ours, theirs = (
            f"{statistics.median(each):7.2f} ({min(each):.2f}–{max(each):.2f})"
            for each in (self.ours, self.theirs)
        )
        ratio = statistics.median(self.ours) / statistics.median(self.theirs)
        size = f"{self.token_bytes / 1024:7.2f} KiB"
        return f"{self.cache:9} {self.rival:6} {size}  {ours} {theirs}  {ratio:5.2f}"


def compare(caches: list[CacheDTypeName], args: argparse.Namespace) -> list[Row]:
    """One format of the cache after the other, with the same weights."""
    longest = args.context + args.new
    config = wide_config(args.layers)
    config = replace(config, language=replace(config.language, max_position_embeddings=longest))
    num_blocks = -(-longest // 16) + 1
    ours = Ours(
        config, device="cpu", dtype="float32", num_blocks=num_blocks,
        formats={"language.layers": WEIGHTS, "language.head": WEIGHTS},
    )  # fmt: skip
    work, rows = Work("decode", [args.context], [args.new], decode_rate), []
    with tempfile.TemporaryDirectory() as made:
        for cache in caches:
            ours.use_engine(cache_dtype=cache)
            theirs = Llama(
                args.llama, folder=str(args.folder or made), layers=args.layers,
                format=THEIR_WEIGHTS, threads=torch.get_num_threads(), cache=PAIRS[cache],
                context=-(-longest // 256) * 256,
            )  # fmt: skip
            size = token_bytes(config.language, cache)
            rates = take_turns(work, ours, theirs, repeats=args.repeats)
            theirs.close()
            rows.append(Row(cache, PAIRS[cache], args.context, size, *rates))
            print(rows[-1].show(), flush=True)
    return rows


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--llama", required=True, help="Python of the other environment")
    parser.add_argument("--context", type=int, default=4000, help="tokens of the prompt")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--caches", nargs="*", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--folder", type=Path, help="keeps llama.cpp's files for the next run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{processor_name()}, {args.threads} threads, context {args.context}")
    print("ours      theirs a token   tokens/s: ours, theirs (lowest–highest); ratio")
    rows = in_own_thread(partial(compare, args.caches, args))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
