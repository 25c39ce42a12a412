"""Ask a running server about a picture, through OpenAI's own client. `minigpt4 serve` starts one.

python examples/client.py http://127.0.0.1:8000 examples/images/three.png "Where is the triangle?"
"""

import base64
import mimetypes
import sys
from pathlib import Path

from openai import OpenAI
from openai.types.chat import ChatCompletionContentPartParam


def main(url: str, picture: str, question: str) -> None:
    """Print the answer while it is being made."""
    kind, _ = mimetypes.guess_type(picture)
    encoded = base64.b64encode(Path(picture).read_bytes()).decode()
    content: list[ChatCompletionContentPartParam] = [
        {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{encoded}"}},
        {"type": "text", "text": question},
    ]
    # A server with --api-key-file wants one of its keys here.
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        for chunk in client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": content}], stream=True
        ):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
