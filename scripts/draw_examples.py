"""Draw the pictures in examples/images: scenes that the demo model was never trained on."""

import random
from pathlib import Path

from PIL import Image

from minigpt4_runtime.evaluation import scenes

OUT_DIR = Path(__file__).parent.parent / "examples" / "images"
NAMES = ("one", "two", "three", "four")
SIDE, OVERSAMPLING = 448, 3


def main() -> None:
    """One scene for each number of shapes, with smooth edges."""
    OUT_DIR.mkdir(parents=True, exist_ok=True)
    rng = random.Random(2023)
    found: dict[int, scenes.Scene] = {}
    while len(found) < len(NAMES):
        scene = scenes.random_scene(rng, held_out=True)
        kinds = {shape.kind for shape in scene.shapes}
        if len(kinds) == len(scene.shapes):
            found.setdefault(len(scene.shapes), scene)
    for count, scene in sorted(found.items()):
        picture = scenes.draw(scene, rng, side=SIDE * OVERSAMPLING)
        picture = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        picture.save(OUT_DIR / f"{NAMES[count - 1]}.png", optimize=True)
        print(f"{NAMES[count - 1]}.png: {scenes.describe(scene)}")


if __name__ == "__main__":
    main()
