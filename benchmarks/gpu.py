"""All GPU checks and measurements of this project, in nine minutes and without a network.

python benchmarks/gpu.py --out DIR
python benchmarks/gpu.py --out DIR --only kernels,profile
python benchmarks/gpu.py --out DIR --dry-run      # tiny shapes on a CPU, to test the script
python scripts/gpu_report.py DIR                  # the results as tables

It needs Linux, this checkout, Python and a CUDA build of torch. Other packages that the machine
lacks are installed from --wheels, a folder that `python scripts/gpu_wheels.py` fills elsewhere.

The plan of the nine minutes, most important first:

part      at most  what it does
facts        45 s  names the card, driver and versions; tries a kernel of ours, graphs, and kernels
                   that overlap, without which all parts go on if they are wrong; measures copying,
                   products of 8192³ in float32, bfloat16, float16, int8 and fp8, and attention over
                   new lengths
kernels      60 s  pytest -m gpu: attention, rows, products and choices in float32, float16 and
                   bfloat16 against the reference
answers      55 s  the demo model's exact answers in float16 and bfloat16; pytest -m gpu: all other
                   tests, the originals' tokens in float32 among them
language     80 s  7B, 32 layers of random weights in float16: decode of 1, 8 and 64 behind 300
                   tokens, prefill of 1,920, each beside transformers; decode without graphs too
fallback     10 s  only where the part above has no numbers: the same by torch alone, so that a
                   kernel that does not work costs no knowledge of the rest
attention    25 s  decode of 1 and 64 × 4,000 tokens as shares of the copy, prompts of the product;
                   caching keys and choosing ids, by torch and in one launch
quantised    35 s  the same decode of 1 and 64 with weights of 8 and 4 bits and of 8-bit floats
products     30 s  a 7B's products with weights of 16, 8 and 4 bits: 1, 8 and 64 rows as shares of
                   the copy, 2,048 rows as shares of the large product, also of 8-bit floats;
                   beside these torch's own 2:4 sparse products
vision       35 s  EVA-ViT-g and Q-Former at full depth: 1 and 16 pictures in torch (float16,
                   bfloat16, 8 bits), as a graph and not, and in ONNX Runtime's CUDA provider
picture      30 s  7B with its image side, random weights: from a picture in memory to the first
                   token about it, with and without graphs; and 64 answers about pictures at once
start        20 s  a model folder of 2 GB into the GPU's memory by 4, 8 and 16 threads, beside the
                   rates of link and file
server       20 s  `minigpt4 serve` with 64 clients that stream answers about pictures
profile      20 s  one decode step of 1 and of 64 answers, and one picture: kernels, and the time
                   in which the GPU waits for the next launch
compiled     20 s  the decode step as it stands, with and without graphs, the model alone as a
                   graph, its kernels overlapping and one by one, and torch alone under
                   torch.compile; then the image side likewise
rival        30 s  8 layers: decode of 1 and 64 beside transformers with a cache of fixed size,
                   plain and under torch.compile with CUDA graphs
tuning       25 s  7B learns: LoRA and the projection over weights of 4 bits, which is to fit into
                   12 GiB, and over bfloat16: peak of memory, tokens per second

Every part is a process with its own time limit, extended by the time that earlier parts did not
use. It writes each result to DIR/PART.json at once, and its output to DIR/PART.log. Later parts run
even if a part fails or is stopped. The run ends after --minutes. The summary begins with the tests
that failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
LAST_LINES = 15
# A dry run measures nothing, and must not time out on a busy CPU.
_DRY_PATIENCE = 20
# The packages that the parts import, by pip's names; the record lists the installed ones.
PACKAGES = (
    "torch", "triton", "numpy", "pillow", "sentencepiece", "typer", "rich", "transformers", "onnx",
    "onnxscript", "onnxruntime", "fastapi", "uvicorn", "h11", "prometheus-client", "httpx",
    "pytest", "pytest-xdist", "hypothesis",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A part of the plan. Its time limit includes start and imports."""

    name: str
    limit_seconds: float
    command: tuple[str, ...] = ()  # Without a command, a part is one of gpu_parts.py.


PLAN = (
    Part("facts", 45), Part("kernels", 60), Part("answers", 55), Part("language", 80),
    Part("fallback", 10), Part("attention", 25), Part("quantised", 35), Part("products", 30),
    Part("vision", 35), Part("picture", 30), Part("start", 20), Part("server", 20),
    Part("profile", 20), Part("compiled", 20), Part("rival", 30),
    Part("tuning", 25),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a part ended: done, failed, out of time, stopped with the run, or not started."""

    status: str
    seconds: float
    limit_seconds: float
    last_lines: tuple[str, ...] = ()


# --- the machine ----------------------------------------------------------------------------------


def find_version(package: str) -> str | None:
    """The version that is installed, by the name that pip knows."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def find_packages() -> dict[str, str]:
    """The installed ones of PACKAGES, with their versions."""
    return {name: version for name in PACKAGES if (version := find_version(name)) is not None}


def install(wheels_dir: Path, site_dir: Path) -> list[str]:
    """Install missing packages and the project from a folder of wheels; return their names.

    The project's wheel is skipped if it was not made from this checkout's source.
    """
    chosen = []
    for wheel in sorted(wheels_dir.glob("*.whl")):
        name = wheel.name.partition("-")[0]
        if name != "minigpt4_runtime":
            is_wanted = find_version(name) is None
        elif not (is_wanted := holds_this_source(wheel)):
            print(f"{wheel.name} is not made from this checkout: its source is run in place.")
        if is_wanted:
            chosen.append(wheel)
    if chosen:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
                   "--no-compile", "--upgrade", "--target", str(site_dir)]  # fmt: skip
        subprocess.run([*command, *map(str, chosen)], check=True, stdin=subprocess.DEVNULL)
    return [wheel.name for wheel in chosen]


def holds_this_source(wheel: Path) -> bool:
    """Whether a wheel of the project has the same Python files as this checkout."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {n: archive.read(n) for n in archive.namelist() if n.endswith(".py")}
    source = CHECKOUT / "src"
    here = {path.relative_to(source).as_posix(): path for path in source.rglob("*.py")}
    return packed.keys() == here.keys() and all(
        packed[name] == path.read_bytes() for name, path in here.items()
    )


def find_commit(wheels_dir: Path | None) -> str:
    """The measured commit, from git or else from the project's wheel."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    wheels = wheels_dir.glob("minigpt4_runtime-*.whl") if wheels_dir else ()
    if wheels_dir and any(map(holds_this_source, wheels)):
        return (wheels_dir / "commit.txt").read_text("utf-8").strip()
    return "unknown"


# --- running --------------------------------------------------------------------------------------


def run_part(part: Part, out_dir: Path, limit_seconds: float, env: Mapping[str, str]) -> Outcome:
    """Run a part to its end or to its limit, and end all of its processes."""
    log_path, started = out_dir / f"{part.name}.log", time.monotonic()
    with log_path.open("wb") as log, process_group(part.command, log, env) as process:
        try:
            status = "failed" if process.wait(limit_seconds) else "done"
        except subprocess.TimeoutExpired:
            status = "out of time"
    lines = log_path.read_text("utf-8", errors="replace").splitlines()
    last_lines = () if status == "done" else tuple(lines[-LAST_LINES:])
    return Outcome(status, time.monotonic() - started, limit_seconds, last_lines)


@contextlib.contextmanager
def process_group(
    command: Sequence[str], log: Any, env: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in its own group, which is killed at the end."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=dict(env),
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_plan(
    plan: Sequence[Part], out_dir: Path, record: dict[str, Any], env: Mapping[str, str]
) -> None:
    """Run all parts in order, and keep in run.json how each ended."""
    due = time.monotonic()  # The latest end of each part that leaves later parts all their time.
    deadline = due + 60 * record["minutes"]
    outcomes = record["parts"] = {
        part.name: asdict(Outcome("not started", 0.0, part.limit_seconds)) for part in plan
    }
    for part in plan:
        due += part.limit_seconds
        left = min(due, deadline) - time.monotonic()
        if left > 0:
            print(f"{part.name} …", flush=True)
            outcomes[part.name]["status"] = "stopped"
            write_record(out_dir, record)
            (out_dir / f"{part.name}.json").unlink(missing_ok=True)
            outcome = run_part(part, out_dir, left, env)
            outcomes[part.name] = asdict(outcome)
            print(f"{part.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
        write_record(out_dir, record)


def write_record(out_dir: Path, record: Mapping[str, Any]) -> None:
    """Write the machine, the commit and the outcomes so far."""
    (out_dir / "run.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def read_results(path: Path) -> list[dict[str, Any]]:
    """A part's results so far."""
    return json.loads(path.read_text("utf-8")) if path.exists() else []


def print_summary(out_dir: Path, record: Mapping[str, Any]) -> None:
    """Print failed tests, then other failures, then the outcome of each part."""
    for name in record["parts"]:
        for result in read_results(out_dir / f"{name}.json"):
            for failure in result.get("failures", ()):
                print(f"FAILED {failure['test']}\n    {failure['why']}")
    for name, outcome in record["parts"].items():
        for result in read_results(out_dir / f"{name}.json"):
            if "error" in result:
                print(f"ERROR {name}, {result['name']}: {result['error']}")
        if outcome["last_lines"]:
            print(f"--- the end of {name}.log", *outcome["last_lines"], sep="\n")
    print("part        ended        seconds  results")
    for name, outcome in record["parts"].items():
        count = len(read_results(out_dir / f"{name}.json"))
        print(f"{name:<12}{outcome['status']:<13}{outcome['seconds']:>7.0f}{count:>9}")
    print(f"All of it: {pack(out_dir)}. As tables: python scripts/gpu_report.py {out_dir}")


def pack(out_dir: Path) -> Path:
    """Pack all results into one file."""
    packed_path = out_dir / "results.tar.gz"
    with tarfile.open(packed_path, "w:gz") as archive:
        for path in sorted({*out_dir.glob("*.json"), *out_dir.glob("*.log")}):
            archive.add(path, path.name)
    return packed_path


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder for all results")
    parser.add_argument("--minutes", type=float, default=9, help="when the run ends (9)")
    parser.add_argument("--only", type=lambda text: text.split(","), help="parts, with commas")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install from")
    args = parser.parse_args()
    if unknown := set(args.only or ()) - {part.name for part in PLAN}:
        names = ", ".join(part.name for part in PLAN)
        parser.error(f"--only: {', '.join(sorted(unknown))} is not among {names}.")
    if args.minutes <= 0:
        parser.error(f"--minutes is {args.minutes:g}; it must be above 0.")
    if args.wheels and not args.wheels.is_dir():
        parser.error(f"--wheels: there is no folder {args.wheels}.")
    return args


def part_commands(args: argparse.Namespace) -> list[Part]:
    """The commands of the selected parts."""
    dry = ("--dry-run",) if args.dry_run else ()
    script = str(CHECKOUT / "benchmarks" / "gpu_parts.py")
    return [
        Part(part.name, part.limit_seconds * (_DRY_PATIENCE if args.dry_run else 1),
             (sys.executable, script, part.name, "--out", str(args.out), *dry))
        for part in PLAN if args.only is None or part.name in args.only
    ]  # fmt: skip


def main() -> None:
    """Install, run all parts, and print the summary."""
    args = read_arguments()
    # The running part is in its own process group: it must be killed at the end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args.out.mkdir(parents=True, exist_ok=True)
    found = find_packages()
    if "torch" not in found:
        sys.exit("torch is not installed: install a build for this machine's GPU first.")
    site_dir = args.out.resolve() / "site"
    installed = install(args.wheels, site_dir) if args.wheels else []
    path = [str(site_dir), str(CHECKOUT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    sys.path[:0] = path[:2]
    importlib.invalidate_caches()
    record: dict[str, Any] = {
        "commit": find_commit(args.wheels), "is_dry": args.dry_run,
        "minutes": args.minutes * (_DRY_PATIENCE if args.dry_run else 1),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "python": platform.python_version(), "packages": find_packages(), "installed": installed,
    }  # fmt: skip
    missing = [name for name in PACKAGES if name not in record["packages"]]
    print(f"Found: {', '.join(found)}; installed from wheels: {', '.join(installed) or 'none'}; "
          f"missing: {', '.join(missing) or 'none'}.", flush=True)  # fmt: skip
    plan = part_commands(args)
    try:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        if not args.dry_run:  # Wherever the tests look for a GPU, kernels must run on it.
            env["TRITON_INTERPRET"] = "0"
        run_plan(plan, args.out, record, env)
    except KeyboardInterrupt:
        print("Stopped. What was measured is kept.")
    print_summary(args.out, record)
    sys.exit(any(each["status"] != "done" for each in record["parts"].values()))


if __name__ == "__main__":
    main()
