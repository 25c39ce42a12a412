"""Fill a folder with the wheels that a machine with a GPU but no network may lack.

python scripts/gpu_wheels.py --out wheels [--python 3.12]

Owns   the list of what is carried along, in the versions of constraints.txt: the project itself,
       and what the server needs. torch, transformers and Triton must be on that machine.
Takes  the version of its Python (Linux, x86-64). With this checkout, benchmarks/gpu.py and these
       wheels are all that travels; more than MOST_BYTES together is refused.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
MOST_BYTES = 50 * 10**6
CARRIED = (
    "annotated-doc", "annotated-types", "fastapi", "h11", "prometheus_client", "pydantic",
    "pydantic_core", "sentencepiece", "starlette", "typing-inspection", "typing_extensions",
    "uvicorn",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64")  # fmt: skip


def pinned(name: str) -> str:
    """NAME==VERSION as constraints.txt has it."""
    text = (CHECKOUT / "constraints.txt").read_text("utf-8")
    found = re.search(rf"^{re.escape(name)}==\S+$", text, flags=re.MULTILINE)
    assert found, f"constraints.txt pins no {name}"
    return found[0]


def run_pip(*arguments: str) -> None:
    """Run pip in this environment."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, cwd=CHECKOUT, check=True)


def travelling_bytes(wheels_dir: Path) -> int:
    """What is carried: every file that git tracks, and the wheels."""
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=CHECKOUT, check=True, capture_output=True, text=True
    )
    tracked = [CHECKOUT / name for name in done.stdout.split("\0") if name]
    return sum(path.stat().st_size for path in (*tracked, *wheels_dir.iterdir()) if path.is_file())


def main() -> None:
    """Build, download, and say what it comes to."""
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
            *map(pinned, CARRIED))  # fmt: skip
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
