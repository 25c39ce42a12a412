"""Describe many pictures at once: they join and leave the running steps as they come and end.

python examples/batch.py examples/images
"""

import sys
from pathlib import Path

from minigpt4_runtime import MiniGPT4


def main(folder: str) -> None:
    """Print each answer as soon as it is done."""
    model = MiniGPT4.load()
    pictures = sorted(Path(folder).glob("*.png"))
    for result in model.describe_all(pictures):
        answer = result.reply.text if result.reply else f"failed: {result.error}"
        print(f"{pictures[result.index].name}: {answer}")
    stats = model.stats()
    print(f"{stats.num_steps} steps for {stats.num_computed_tokens} tokens", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
