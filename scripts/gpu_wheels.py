"""Fill a folder with the wheels that a machine with a GPU but no network may lack.

python scripts/gpu_wheels.py --out wheels [--python 3.12]

Owns   the list of wheels: the project, and the needs of its server and tokenizer, in the versions
       of this environment. The machine must have torch, numpy, pillow, typer and rich; without
       transformers, Triton or pytest fewer things are measured.
Takes  the version of that machine's Python (Linux, x86-64). Checkout and wheels together may not
       exceed MOST_BYTES.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[1]
MOST_BYTES = 50 * 10**6
# Imports of benchmarks/gpu.py's parts that are seldom installed.
CARRIED = ("fastapi", "httpx", "prometheus_client", "sentencepiece", "uvicorn")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64")  # fmt: skip


def with_needs(names: tuple[str, ...]) -> list[str]:
    """Packages and all their requirements, as NAME==VERSION of the installed versions."""
    versions: dict[str, str] = {}
    left = [*map(canonicalize_name, names)]
    while left:
        name = left.pop()
        if name not in versions:
            versions[name] = metadata.version(name)
            needs = map(Requirement, metadata.requires(name) or ())
            left += [
                canonicalize_name(need.name)
                for need in needs
                if need.marker is None or need.marker.evaluate({"extra": ""})
            ]
    return [f"{name}=={version}" for name, version in sorted(versions.items())]


def run_pip(*arguments: str) -> None:
    """Run pip in this environment."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, cwd=CHECKOUT, check=True)


def travelling_bytes(wheels_dir: Path) -> int:
    """The size of all files that git tracks, and of the wheels."""
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=CHECKOUT, check=True, capture_output=True, text=True
    )
    tracked = [CHECKOUT / name for name in done.stdout.split("\0") if name]
    return sum(path.stat().st_size for path in (*tracked, *wheels_dir.iterdir()) if path.is_file())


def main() -> None:
    """Build, download, and print the total size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder; its wheels go first")
    parser.add_argument("--python", default="3.12", help="the version of Python there (3.12)")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for wheel in out.glob("*.whl"):
        wheel.unlink()
    run_pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), ".")
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    run_pip("download", "-q", "--no-deps", "--only-binary=:all:", "--implementation", "cp",
            "--python-version", args.python, *platforms, "-d", str(out),
            *with_needs(CARRIED))  # fmt: skip
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, text=True)
    (out / "commit.txt").write_text(commit.stdout, "utf-8")
    num_bytes = travelling_bytes(out)
    if num_bytes > MOST_BYTES:
        sys.exit(
            f"The checkout and {out} come to {num_bytes / 1e6:.1f} MB, more than "
            f"{MOST_BYTES / 1e6:.0f}. Carry less, or raise MOST_BYTES."
        )
    names = ", ".join(wheel.name for wheel in sorted(out.glob("*.whl")))
    print(f"{names}\nWith the checkout: {num_bytes / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
