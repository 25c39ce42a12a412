"""The start-up time of the import and of `minigpt4 --help`.

Run    python benchmarks/startup.py [--runs 20], on an idle machine.
Gives  median and fastest time over fresh processes, and the promise. Exits with 1 if it is broken.

The import is `python -c "import minigpt4_runtime"` less `python -c pass`, run in turns; --help is
the whole time.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

IMPORT_PROMISE_MS = 30.0
HELP_PROMISE_MS = 400.0


@dataclass(frozen=True)
class Timing:
    """Wall times of all runs of one command."""

    median_ms: float
    fastest_ms: float

    def less(self, other: "Timing") -> "Timing":
        """The time beyond that of `other`."""
        return Timing(self.median_ms - other.median_ms, self.fastest_ms - other.fastest_ms)


def measure(commands: Sequence[Sequence[str]], runs: int) -> list[Timing]:
    """Run the commands in turns, each `runs` times; one more run before warms the file cache."""
    times: list[list[float]] = [[] for _ in commands]
    for run in range(runs + 1):
        for command, times_ms in zip(commands, times, strict=True):
            start = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, check=True)
            if run > 0:
                times_ms.append((time.perf_counter() - start) * 1000)
    return [Timing(statistics.median(times_ms), min(times_ms)) for times_ms in times]


def main() -> int:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description="Measure how long a user waits at the start.")
    parser.add_argument("--runs", type=int, default=20, help="processes per line (default 20)")
    runs = parser.parse_args().runs
    bare, package = measure(
        [[sys.executable, "-c", "pass"], [sys.executable, "-c", "import minigpt4_runtime"]], runs
    )
    minigpt4 = str(Path(sys.executable).with_name("minigpt4"))
    (shown_help,) = measure([[minigpt4, "--help"]], runs)

    table = Table("what", "median", "fastest", "promised", "kept")
    all_kept = True
    for what, timing, promise_ms in (
        ("import minigpt4_runtime", package.less(bare), IMPORT_PROMISE_MS),
        ("minigpt4 --help", shown_help, HELP_PROMISE_MS),
    ):
        kept = timing.median_ms <= promise_ms
        all_kept = all_kept and kept
        numbers = [f"{ms:.1f} ms" for ms in (timing.median_ms, timing.fastest_ms, promise_ms)]
        table.add_row(what, *numbers, "yes" if kept else "NO")
    Console().print(table)
    return 0 if all_kept else 1


if __name__ == "__main__":
    sys.exit(main())
