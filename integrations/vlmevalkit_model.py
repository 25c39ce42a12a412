"""A model class for VLMEvalKit, which answers with this runtime.

Owns   the translation of its messages and answers.
Takes  lists of {"type": "text" or "image", "value": text or path}, as its `generate` checks them.
"""

from __future__ import annotations

from typing import Any

from vlmeval.vlm.base import BaseModel

from minigpt4_runtime import MiniGPT4, RequestError, SamplingParams
from minigpt4_runtime.messages import image


class MiniGPT4Runtime(BaseModel):  # type: ignore[misc]
    """MiniGPT-4 by minigpt4-runtime. `settings` go to `MiniGPT4.load`."""

    INSTALL_REQ = False
    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(
        self,
        model: str | None = None,
        *,
        sampling: SamplingParams | None = None,
        **settings: Any,
    ) -> None:
        """Load the model of this folder or name; without one the demo model."""
        super().__init__()
        self.model = MiniGPT4.load(model or "demo", **settings)
        self.sampling = sampling or SamplingParams()

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to one message; texts side by side are lines, as VLMEvalKit joins them.

        Raises:
            RuntimeError: it cannot be served. With SKIP_ERR=1 VLMEvalKit then goes on without it.
        """
        del dataset
        content: list[Any] = []
        for part in message:
            if part["type"] == "image":
                content.append(image(part["value"]))
            elif content and isinstance(content[-1], str):
                content[-1] += f"\n{part['value']}"
            else:
                content.append(part["value"])
        try:
            return self.model.chat([{"role": "user", "content": content}], self.sampling).text
        except RequestError as error:
            raise RuntimeError(str(error)) from error
