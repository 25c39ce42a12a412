"""MiniGPT4: the promise to users, and all that tools may use.

Owns   the path of a request from messages to a reply, and the choice of device and dtype.
Takes  messages and pictures; gives replies, deltas, rows and encoded prompts.
Never  knows HTTP or the command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from PIL.Image import Image
from torch import Tensor

from minigpt4_runtime.answer import AnswerText
from minigpt4_runtime.backend.contracts import DeviceBackend
from minigpt4_runtime.backend.registry import attention_kernel, open_device
from minigpt4_runtime.backend.vision_torch import TorchVisionEncoder
from minigpt4_runtime.checkpoint.load import load_config, load_model
from minigpt4_runtime.config import DTYPE_NAMES, DTypeName, ModelConfig, SamplingParams
from minigpt4_runtime.engine.engine import Engine
from minigpt4_runtime.engine.request import ImageInput, Request
from minigpt4_runtime.engine.runner import Runner
from minigpt4_runtime.errors import ConfigError, RequestError
from minigpt4_runtime.messages import (
    ImageSource,
    Message,
    Reply,
    TextDelta,
    Usage,
    image,
    read_messages,
)
from minigpt4_runtime.pixels import ImageLimits
from minigpt4_runtime.pixels import load as load_image
from minigpt4_runtime.prompt import DESCRIBE_PROMPT, Prompt, find_template, render
from minigpt4_runtime.tokenizer import EncodedPrompt, ImageSpan, Tokenizer

_PICTURES_AT_ONCE = 8
DEMO_MODEL_DIR = Path(__file__).parent / "assets" / "demo"

Messages = Sequence[Message | Mapping[str, Any]]
Picture = ImageSource | str | PathLike[str] | bytes | Image | numpy.ndarray[Any, Any]


class MiniGPT4:
    """A loaded model. Make one with `MiniGPT4.load`; use it from any number of requests."""

    def __init__(
        self,
        model_dir: Path,
        *,
        backend: DeviceBackend,
        dtype: DTypeName,
        image_limits: ImageLimits,
    ) -> None:
        self.config: ModelConfig = load_config(model_dir)
        self.model_dir = model_dir
        self.dtype: DTypeName = dtype
        self.device = str(backend.device)
        self._template = find_template(self.config.template)
        self._image_limits = image_limits
        self._tokenizer = Tokenizer(model_dir / "tokenizer.model")
        model = load_model(
            model_dir,
            device=backend.device,
            dtype=getattr(torch, dtype),
            free_bytes=backend.free_memory_bytes(),
        )
        self._vision = TorchVisionEncoder(model.vision)
        self._engine = Engine(
            Runner(model, self._vision, attention_kernel(backend.facts.attention)),
            bos_id=self._tokenizer.bos_id,
            eos_id=self._tokenizer.eos_id,
        )

    @classmethod
    def load(
        cls,
        model: str | PathLike[str] | None = None,
        *,
        device: str = "auto",
        dtype: DTypeName | Literal["auto"] = "auto",
        image_limits: ImageLimits | None = None,
    ) -> MiniGPT4:
        """Load a model folder; without one, the bundled demo model, which knows drawn scenes.

        Args:
            model: a folder made by `minigpt4 convert`.
            device: auto, cpu, cuda, cuda:1, npu, …; auto takes the first accelerator, else the CPU.
            dtype: auto, float32, float16 or bfloat16; auto is float32 on a CPU, else float16.
            image_limits: what a picture may weigh at most.

        Raises:
            ConfigError: a setting has no meaning.
            CheckpointError: the folder is no whole model.
            BackendUnavailableError: the device is not on this machine, or has too little memory.
        """
        if dtype not in ("auto", *DTYPE_NAMES):
            raise ConfigError(f"dtype is {dtype!r}; it must be auto or {', '.join(DTYPE_NAMES)}.")
        backend = open_device(device)
        return cls(
            Path(model) if model is not None else DEMO_MODEL_DIR,
            backend=backend,
            dtype=backend.facts.default_dtype if dtype == "auto" else dtype,
            image_limits=image_limits or ImageLimits(),
        )

    def describe(
        self,
        picture: Picture,
        prompt: str = DESCRIBE_PROMPT,
        sampling: SamplingParams | None = None,
    ) -> Reply:
        """Ask one question about one picture."""
        return self.chat([_question(picture, prompt)], sampling)

    def chat(self, messages: Messages, sampling: SamplingParams | None = None) -> Reply:
        """Answer the last message of a dialogue.

        Raises:
            RequestError: messages, a picture or the prompt's length cannot be served.
        """
        reply = None
        for delta in self.stream(messages, sampling):
            reply = delta.reply
        assert reply is not None, "a stream ends with its reply"
        return reply

    def stream(
        self, messages: Messages, sampling: SamplingParams | None = None
    ) -> Iterator[TextDelta]:
        """Answer like `chat`, giving the text as it grows. Wrong input is refused at once.

        The last delta carries the finished `reply`. The deltas' texts together are its text, unless
        the model itself writes "Assistant:", up to which a reply is dropped, as in the original.
        """
        return self._answer(self._request(messages, sampling or SamplingParams()))

    def embed_images(self, pictures: Sequence[Picture]) -> Tensor:
        """Pictures → (N, rows, hidden) float32 on the CPU, as the language model reads them."""
        if isinstance(pictures, (str, bytes)) or not isinstance(pictures, Sequence):
            raise RequestError("embed_images takes a list of pictures, not a single one.")
        rows = [torch.empty(0, self.config.rows_per_image, self.config.language.hidden_size)]
        for first in range(0, len(pictures), _PICTURES_AT_ONCE):
            some = pictures[first : first + _PICTURES_AT_ONCE]
            pixels = [
                load_image(_as_source(picture), self.config.vision, self._image_limits).values
                for picture in some
            ]
            rows.append(self._vision.encode(torch.from_numpy(numpy.stack(pixels))).float().cpu())
        return torch.cat(rows)

    def encode_prompt(self, messages: Messages) -> EncodedPrompt:
        """What the model would be given: ids, image spans, ids per text piece, and the text."""
        return self._encode(render(read_messages(messages), self._template))

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        return self._tokenizer.encode_prompt(
            prompt,
            rows_per_image=self.config.rows_per_image,
            image_token_id=self.config.image_token_id,
        )

    def _request(self, messages: Messages, sampling: SamplingParams) -> Request:
        prompt = render(read_messages(messages), self._template)
        encoded = self._encode(prompt)
        self._engine.check(encoded.token_ids, sampling)
        images = tuple(
            self._image_input(source, span)
            for source, span in zip(prompt.images, encoded.image_spans, strict=True)
        )
        return Request(encoded.token_ids, images, sampling)

    def _image_input(self, source: ImageSource, span: ImageSpan) -> ImageInput:
        picture = load_image(source, self.config.vision, self._image_limits)
        return ImageInput(
            torch.from_numpy(picture.values), picture.digest, span.start, span.num_rows
        )

    def _answer(self, request: Request) -> Iterator[TextDelta]:
        answer = AnswerText(self._tokenizer, self._template, request.sampling.stop)
        token_ids: list[int] = []
        finish_reason = None
        for event in self._engine.generate(request):
            token_ids.append(event.token_id)
            text = answer.feed(event.token_id)
            finish_reason = "stop" if answer.stopped else event.finish_reason
            if text:
                yield TextDelta(text)
            if answer.stopped:
                break
        assert finish_reason is not None, "an answer ends with a reason"
        usage = Usage(len(request.token_ids), len(token_ids))
        rest = answer.finish()
        yield TextDelta(rest, Reply(answer.reply, tuple(token_ids), finish_reason, usage))


def _as_source(picture: Picture) -> ImageSource:
    return picture if isinstance(picture, ImageSource) else image(picture)


def _question(picture: Picture, prompt: str) -> Message:
    return Message("user", (_as_source(picture), prompt))
