"""Describe one picture with the bundled demo model, or with a model folder of your own.

python examples/describe.py examples/images/three.png [MODEL_DIR]
"""

import sys

from minigpt4_runtime import MiniGPT4


def main(picture: str, model_dir: str | None = None) -> None:
    """Print what is in the picture."""
    model = MiniGPT4.load(model_dir)
    reply = model.describe(picture)
    print(reply.text)
    print(f"({reply.usage.completion_tokens} tokens, {reply.finish_reason})", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
