"""What each weight format costs the demo model: exact answers, and parity with its floats.

python benchmarks/demo_formats.py --work-dir DIR [--scenes 200] [--pictures 100] [--formats …]

For each format it runs what a user would: `minigpt4 quantise`, `evaluate demo`, and over drawn
pictures `describe` and `evaluate parity`. "+calibrated" after a format rounds by pictures and texts
of other scenes. The table is Markdown.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from minigpt4_runtime.evaluation.scenes import describe, draw, random_scene
from minigpt4_runtime.loaded import DEMO_MODEL_DIR

FORMATS = [
    "w8a16", "w8a8", "w8a8-g32", "w4a16-g32", "w4a8-g32", "w4a16-g32-asymmetric",
    "w4a16-g32+calibrated", "w8a8-sparse24", "w8a8-sparse24+calibrated",
]  # fmt: skip


def run(*words: str | Path) -> None:
    """A command of ours, which must succeed."""
    command = [sys.executable, "-m", "minigpt4_runtime", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"error: minigpt4 {' '.join(map(str, words))}: {done.stderr}")


def draw_pictures(folder: Path, count: int, *, seed: int) -> Path:
    """Pictures of scenes, and beside the folder a .jsonl of them and their descriptions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = random.Random(seed), []
    for number in range(count):
        scene = random_scene(rng, held_out=True)
        path = folder / f"{number:04}.png"
        draw(scene, rng).save(path)
        lines.append(json.dumps({"image": str(path), "answer": describe(scene)}))
    texts = folder.with_suffix(".jsonl")
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return texts


def read_report(folder: Path, name: str) -> Any:
    """What `evaluate --out` wrote."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


class Costs:
    """The demo model in floats, and what another model differs by."""

    def __init__(self, work_dir: Path, floats: Path, num_pictures: int, num_scenes: int) -> None:
        self._dir, self._floats, self._num_scenes = work_dir, floats, num_scenes
        self._pictures = work_dir / "pictures"
        draw_pictures(self._pictures, num_pictures, seed=1)
        self._reference = self._describe(floats, "float")

    def _describe(self, model: Path, name: str) -> Path:
        answers = self._dir / f"{name}.jsonl"
        answers.unlink(missing_ok=True)
        run("describe", self._pictures, "--model", model, "--out", answers)
        return answers

    def row(self, model: Path, name: str) -> str:
        """A line of the table."""
        report = self._dir / f"{name}-report"
        run(
            "evaluate", "demo", "--model", model, "--scenes", str(self._num_scenes), "--out", report
        )
        groups = read_report(report, "demo")["groups"].values()
        right, asked = (sum(group[what] for group in groups) for what in ("right", "asked"))
        size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 2**20
        cells = [name, f"{size:.1f} MiB", f"{right / asked:.1%}"]
        if model != self._floats:
            run(
                "evaluate", "parity", "--reference", self._reference,
                "--candidate", self._describe(model, name), "--images", self._pictures,
                "--reference-model", self._floats, "--candidate-model", model, "--out", report,
            )  # fmt: skip
            found = read_report(report, "parity")
            parted = [pair["num_equal"] for pair in found["pairs"] if pair["num_equal"] is not None]
            cells += [
                f"{found['exact_rate']:.0%}", f"{found['mean_agreement']:.1%}",
                f"{statistics.median(parted):g}" if parted else "", f"{found['mean_kl']:.2g}",
            ]  # fmt: skip
        return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Quantise, evaluate and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    args = parser.parse_args()
    lessons = draw_pictures(args.work_dir / "lessons", 100, seed=2)
    costs = Costs(args.work_dir, DEMO_MODEL_DIR, args.pictures, args.scenes)
    print(
        "| format | size | exact answers | same text | tokens that agree | until they part | KL |\n"
        "|---|---|---|---|---|---|---|"
    )
    print(costs.row(DEMO_MODEL_DIR, "float"), flush=True)
    for name in args.formats:
        chosen, _, is_calibrated = name.partition("+")
        model = args.work_dir / name
        options: list[str | Path] = ["--calibrate", lessons] if is_calibrated else []
        run("quantise", DEMO_MODEL_DIR, "--format", chosen, "--out", model, "--force", *options)
        print(costs.row(model, name), flush=True)


if __name__ == "__main__":
    main()
