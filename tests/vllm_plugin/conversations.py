"""What our API is asked, as vLLM is asked it."""

import base64
import os
from pathlib import Path

from PIL import Image

from minigpt4_runtime import Message

# Read by vLLM when it starts.
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip

ENGINE = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8}


def as_part(part) -> dict:
    """A part of a message in OpenAI's form; a picture that is no file as vLLM takes it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part.value, Image.Image):
        return {"type": "image_pil", "image_pil": part.value}
    content = base64.b64encode(Path(part.value).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}


def as_dicts(messages: list[Message]) -> list[dict]:
    """A dialogue in OpenAI's form."""
    return [
        {"role": message.role, "content": [as_part(part) for part in message.content]}
        for message in messages
    ]
