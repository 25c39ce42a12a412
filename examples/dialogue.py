"""Several turns about one picture: the dialogue is a list that grows.

python examples/dialogue.py examples/images/four.png "Where is the star?" "What colour is the ring?"
"""

import sys

from minigpt4_runtime import Message, MiniGPT4, image


def main(picture: str, *questions: str) -> None:
    """Ask one question after the other."""
    model = MiniGPT4.load()
    messages: list[Message] = []
    for number, question in enumerate(questions):
        content = (image(picture), question) if number == 0 else (question,)
        messages.append(Message("user", content))
        reply = model.chat(messages)
        messages.append(Message("assistant", (reply.text,)))
        print(f"{question} {reply.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
