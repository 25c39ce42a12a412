"""Compare pictures by the rows that the language model would read.

python examples/embed.py examples/images/one.png examples/images/two.png
"""

import sys
from itertools import combinations

from torch.nn import functional

from minigpt4_runtime import MiniGPT4


def main(*pictures: str) -> None:
    """Print the cosine similarity of every pair."""
    rows = MiniGPT4.load().embed_images(pictures).flatten(1)
    for (i, first), (j, second) in combinations(enumerate(pictures), 2):
        similarity = float(functional.cosine_similarity(rows[i], rows[j], dim=0))
        print(f"{similarity:.3f}  {first}  {second}")


if __name__ == "__main__":
    main(*sys.argv[1:])
