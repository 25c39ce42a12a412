"""Describe a folder of pictures, also in an object store, with Ray Data: two models work at once.

python examples/ray_describe.py examples/images /tmp/described

`minigpt4 describe FOLDER --ray --out DIR` does this too, and can be continued when it is killed.
"""

import sys
from typing import Any

import ray

from minigpt4_runtime import MiniGPT4


class Describe:
    """A model in a process of its own: bytes of pictures become answers."""

    def __init__(self) -> None:
        self.model = MiniGPT4.load()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answer a whole batch at once, in its order; the pictures themselves are left out."""
        found = sorted(self.model.describe_all(batch.pop("bytes")), key=lambda each: each.index)
        answers = [each.reply.text if each.reply else None for each in found]
        errors = [str(each.error) if each.error else None for each in found]
        return {**batch, "answer": answers, "error": errors}


def main(folder: str, out: str) -> None:
    """Write a row for each picture into Parquet files."""
    pictures = ray.data.read_binary_files(folder, include_paths=True, file_extensions=["png"])
    workers = ray.data.ActorPoolStrategy(size=2)
    # Workers that took every CPU would leave none for reading, and wait for ever.
    described = pictures.map_batches(Describe, batch_size=64, compute=workers, num_cpus=0.5)
    described.write_parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
