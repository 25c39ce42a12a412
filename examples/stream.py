"""Print an answer while it is being made, sampled with a seed so that it can be had again.

python examples/stream.py examples/images/four.png "What is on the right?"
"""

import sys

from minigpt4_runtime import MiniGPT4, SamplingParams, image


def main(picture: str, question: str) -> None:
    """Stream the answer to one question."""
    model = MiniGPT4.load()
    messages = [{"role": "user", "content": [image(picture), question]}]
    for delta in model.stream(messages, SamplingParams(temperature=0.5, seed=1)):
        print(delta.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
