"""MiniGPT4: the public interface, for users and for the tools of this package.

Owns   the path of a request from messages to a reply. `loaded` owns the model and the engine, and
       `probe` the measuring points.
Takes  messages and images; gives replies, deltas, rows and encoded prompts.
Never  knows HTTP or the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor

from minigpt4_runtime.batch.image_run import ImageRun
from minigpt4_runtime.checkpoint.shelf import find_model
from minigpt4_runtime.checkpoint.weight_source import WeightSource
from minigpt4_runtime.config import (
    CacheDTypeName,
    DTypeName,
    EngineConfig,
    ModelConfig,
    SamplingParams,
    VisionRuntimeName,
    VisionSettings,
)
from minigpt4_runtime.engine.engine import EngineStats
from minigpt4_runtime.engine.request import Heard, ImageInput, TokenEvent
from minigpt4_runtime.engine.ticket import Ticket
from minigpt4_runtime.formats.registry import FormatChoice
from minigpt4_runtime.images.pixels import ImageLimits, PixelImage
from minigpt4_runtime.images.pixels import load as load_image
from minigpt4_runtime.lab.lab import Lab
from minigpt4_runtime.loaded import DEMO_MODEL_DIR as DEMO_MODEL_DIR
from minigpt4_runtime.loaded import LoadedModel
from minigpt4_runtime.messages import (
    Described,
    ImageSource,
    Message,
    Reply,
    TaskName,
    TextDelta,
    TokenLogprobs,
    Usage,
    image,
    read_messages,
)
from minigpt4_runtime.probe import Probe
from minigpt4_runtime.text.answer import AnswerText
from minigpt4_runtime.text.boxes import find_boxes
from minigpt4_runtime.text.prompt import (
    DESCRIBE_PROMPT,
    Prompt,
    check_task,
    find_template,
    read_raw,
    render,
    write_script,
)
from minigpt4_runtime.text.tokenizer import EncodedPrompt
from minigpt4_runtime.text.window import Kept, Window, dialogue_window, text_window

if TYPE_CHECKING:
    from minigpt4_runtime.messages import ImageLike
    from minigpt4_runtime.rope_scaling import RopeScaling

Messages = Sequence[Message | Mapping[str, Any]]


class MiniGPT4:
    """A loaded model. Make one with `MiniGPT4.load`; use it from any number of threads at once.

    Requests run together, joining and leaving at every step, and share equal beginnings of prompts.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self.probe = Probe(loaded)
        self.config: ModelConfig = loaded.config
        self.model_dir = loaded.model_dir
        self.dtype: DTypeName = loaded.dtype
        self.device = str(loaded.backend.device)
        self.tensor_parallel = loaded.ranks.size
        self.vision_runtime = loaded.vision_runtime
        self._template = find_template(self.config.template)
        self._tokenizer = loaded.tokenizer

    @property
    def has_boxes(self) -> bool:
        """Whether answers may point at parts of a picture: `Reply.boxes`."""
        return self._template.has_boxes

    @property
    def engine_config(self) -> EngineConfig:
        """The present settings of the engine."""
        return self._loaded.engine_config

    @classmethod
    def load(  # noqa: PLR0913 - the one place with every choice.
        cls,
        model: str | PathLike[str] | None = None,
        *,
        device: str = "auto",
        dtype: DTypeName | Literal["auto"] = "auto",
        engine: EngineConfig | Mapping[str, Any] | None = None,
        image_limits: ImageLimits | None = None,
        tensor_parallel: int = 1,
        vision_runtime: VisionRuntimeName = "auto",
        vision_graph: str | PathLike[str] | None = None,
        provider: str | None = None,
        rope_scaling: RopeScaling | Mapping[str, Any] | str | None = None,
        max_context: int | None = None,
        adapter: str | PathLike[str] | None = None,
    ) -> MiniGPT4:
        """Load a model folder; without one, the bundled demo model, which knows drawn scenes.

        Args:
            model: a folder made by `minigpt4 convert`, or the name of a fetched model: "vicuna-7b".
            device: auto, cpu, cuda, cuda:1, npu, …; auto takes the first accelerator, else the CPU.
            dtype: auto, float32, float16 or bfloat16; auto is float32 on a CPU, else float16.
            engine: how many requests run at once, and the caches between them.
            image_limits: the largest size of an image, in bytes and pixels.
            tensor_parallel: the number of devices that share the language model. This process
                leads and starts the others; or torchrun has started all of them, and then each
                calls `follow` first.
            vision_runtime: auto, torch, onnx or om: the runtime of the image side. auto is that of
                the graph, or torch without one.
            vision_graph: a folder made by `minigpt4 export vision`, or a file in it.
            provider: the provider of ONNX Runtime: cuda, cann, openvino or cpu. Without it, the
                first of these that it has.
            rope_scaling: how positions are stretched beyond the length of training: "yarn:4",
                "linear:2", "ntk:2", "llama3:8", or with all fields of config.json; "none" for not
                at all. Without it, what the folder's config.json says.
            max_context: how many tokens a sequence may have; without it, as many as positions
                reach.
            adapter: a file made by `minigpt4 tune` of this model, whose weights take the place of
                the folder's.

        Raises:
            ConfigError: a setting has no meaning, or this process is to `follow` another.
            CheckpointError: the folder is incomplete, the named model is not fetched yet, or the
                graph or the adapter is another model's.
            BackendUnavailableError: the device is not on this machine, or has too little memory.
        """
        model_dir = find_model(model) if model is not None else DEMO_MODEL_DIR
        source = WeightSource.folder(
            model_dir, rope_scaling=rope_scaling, max_context=max_context,
            adapter=Path(adapter) if adapter is not None else None,
        )  # fmt: skip
        vision = VisionSettings(runtime=vision_runtime, graph=vision_graph, provider=provider)
        return cls(
            LoadedModel(
                source, device=device, dtype=dtype, engine=EngineConfig.read(engine),
                image_limits=image_limits or ImageLimits(), tensor_parallel=tensor_parallel,
                vision=vision,
            )
        )  # fmt: skip

    @classmethod
    def with_random_weights(
        cls,
        config: ModelConfig,
        *,
        device: str = "auto",
        dtype: DTypeName | Literal["auto"] = "auto",
        engine: EngineConfig | Mapping[str, Any] | None = None,
        tensor_parallel: int = 1,
        formats: FormatChoice = "float",
        seed: int = 0,
    ) -> MiniGPT4:
        """Make a model of any shape without a file, for measuring: its answers are nonsense.

        It takes the demo model's tokenizer. Ids beyond that add nothing to an answer's text.
        `formats` hold the weights, as in the manifest of a folder. Settings are those of `load`.

        Raises:
            ConfigError: a setting has no meaning, or the shape has fewer ids than the tokenizer.
            BackendUnavailableError: the device is not on this machine, or has too little memory.
        """
        return cls(
            LoadedModel(
                WeightSource(config, seed=seed, formats=formats), device=device, dtype=dtype,
                engine=EngineConfig.read(engine), image_limits=ImageLimits(),
                tensor_parallel=tensor_parallel, vision=VisionSettings(),
            )
        )  # fmt: skip

    def close(self) -> None:
        """End running requests with an error, and the other ranks. New requests are rejected."""
        self._loaded.close()

    def __enter__(self) -> Self:
        """For `with`: closed at its end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def describe(
        self,
        image: ImageLike,
        prompt: str = DESCRIBE_PROMPT,
        sampling: SamplingParams | None = None,
        *,
        task: TaskName | None = None,
    ) -> Reply:
        """Ask one question about one image. MiniGPT-v2 knows tasks, such as "grounding"."""
        return self.chat([_question(image, prompt, task)], sampling)

    def chat(self, messages: Messages, sampling: SamplingParams | None = None) -> Reply:
        """Answer the last message of a dialogue, or go on with it where it is the assistant's.

        The reply to a continued answer has only the new text.

        Raises:
            RequestError: messages, an image or the prompt's length cannot be served.
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
        return iter(self.submit(messages, sampling))

    def submit(
        self, messages: Messages, sampling: SamplingParams | None = None
    ) -> Ticket[TextDelta]:
        """Begin to answer, and give a ticket to read: iterate it, `async for` it, or cancel it.

        The answer grows whether the ticket is read or not; dropping the ticket cancels it.
        """
        sampling = sampling or SamplingParams()
        script = write_script(read_messages(messages), self._template)
        kept, window = self._keep(
            lambda: Kept.whole(self._encode(script.prompt())),
            partial(dialogue_window, script, self._encode),
            sampling,
        )
        last_images = script.images[len(script.images) - len(kept.image_starts) :]
        pictures = [self._open(source) for source in last_images]
        images = tuple(map(self._image_input, pictures, kept.image_starts))
        before, space = self._tokenizer.encode_begun(script.begun)
        begins_with = None if not before or script.begun[-1].isspace() else space
        answer = AnswerText(
            self._tokenizer, self._template, sampling, before=before, begins_with=begins_with
        )
        shown = pictures[-1].size if pictures and self._template.has_boxes else None
        watch = _TextWatch(answer)
        reader = _ReplyReader(kept, window, len(script.images), shown)
        return self._loaded.submit(kept.token_ids, images, sampling, watch, reader, window)

    def submit_raw(
        self,
        text: str,
        pictures: Sequence[ImageLike] = (),
        sampling: SamplingParams | None = None,
    ) -> Ticket[TextDelta]:
        """Answer a prompt as it is written: no template and no system text are added.

        `<ImageHere>` is the place of a picture, `<s>` and `</s>` are control ids, and a BOS id
        stands before it all. Give it no text of strangers, who could write these too. The answer
        ends and is trimmed as one to messages; a `cache_window` does not shorten the prompt.

        Raises:
            RequestError: there are not as many places as pictures, or the prompt is too long.
        """
        sampling = sampling or SamplingParams()
        prompt = read_raw(text, [image(each) for each in pictures])
        kept = Kept.whole(self._encode(prompt))
        self._loaded.engine.check(len(kept.token_ids), sampling)
        opened = [self._open(source) for source in prompt.images]
        images = tuple(map(self._image_input, opened, kept.image_starts))
        watch = _TextWatch(AnswerText(self._tokenizer, self._template, sampling))
        shown = opened[-1].size if opened and self._template.has_boxes else None
        reader = _ReplyReader(kept, None, len(images), shown)
        return self._loaded.submit(kept.token_ids, images, sampling, watch, reader)

    def submit_text(
        self, text: str | Sequence[int], sampling: SamplingParams | None = None
    ) -> Ticket[TextDelta]:
        """Go on from a text, or its ids, as it is: no template, no images, nothing trimmed.

        It ends at `</s>` and at the strings in `stop`; the template's stops do not apply. The space
        before an answer with a form is left out.

        Raises:
            RequestError: an id is not in the vocabulary, or there are none or too many.
        """
        sampling = sampling or SamplingParams()
        token_ids = self.encode_text(text) if isinstance(text, str) else text
        self._loaded.check_ids(token_ids)
        kept, window = self._keep(
            lambda: Kept(tuple(token_ids), ()), partial(text_window, token_ids), sampling
        )
        answer = AnswerText(self._tokenizer, None, sampling, before=token_ids, begins_with="")
        watch, reader = _TextWatch(answer), _ReplyReader(kept, window, num_images=0)
        return self._loaded.submit(kept.token_ids, (), sampling, watch, reader, window)

    def describe_all(
        self,
        images: Iterable[ImageLike],
        prompt: str = DESCRIBE_PROMPT,
        sampling: SamplingParams | None = None,
        *,
        task: TaskName | None = None,
        is_raw: bool = False,
    ) -> Iterator[Described]:
        """Ask one question about each of any number of images, many at once.

        A raw prompt has `<ImageHere>` in it and is taken as it is, see `submit_raw`.

        Images are opened ahead, in threads, only as many as keep the engine full. Results come as
        they are done. The result of an image that cannot be served has an error.

        Raises:
            GrammarError: the schema or regex of `sampling` cannot be followed.
            RequestError: the model knows no such task.
        """
        self.prepare(sampling or SamplingParams())
        check_task(task, self._template)

        def submit(image: ImageLike) -> Ticket[TextDelta]:
            if is_raw:
                return self.submit_raw(prompt, [image], sampling)
            return self.submit([_question(image, prompt, task)], sampling)

        return ImageRun(submit, max_running=self.engine_config.max_running).of(images)

    @property
    def tasks(self) -> tuple[TaskName, ...]:
        """The tasks that a question may have: MiniGPT-v2's, or none."""
        return self._template.tasks

    def stats(self) -> EngineStats:
        """The counters and the present state of the engine."""
        return self._loaded.engine.stats()

    def prepare(self, sampling: SamplingParams) -> None:
        """Compile the form of answers, so that the first question need not wait for it.

        Raises:
            GrammarError: the schema or regex cannot be followed.
            BackendUnavailableError: llguidance is not installed.
        """
        self._loaded.guide(sampling)

    @property
    def cache_dtype(self) -> CacheDTypeName:
        """How keys and values are kept; "auto" is the dtype of the model."""
        chosen = self._loaded.engine_config.cache_dtype
        return self.dtype if chosen == "auto" else chosen

    def token_bytes(self, token_id: int) -> bytes:
        """The text of a token within a reply, as UTF-8; the name of a control token."""
        return self._tokenizer.bytes_of(token_id)

    def embed_images(self, images: Sequence[ImageLike]) -> Tensor:
        """Images → (N, rows, hidden) float32 on the CPU, as the language model reads them."""
        return self.probe.embed_images(images)

    def lab(self) -> Lab:
        """The model opened for study: gradients, hidden states, attention, hooks, own searches.

        It shares the weights and nothing else with the engine, which may go on answering.

        Raises:
            RequestError: ranks share the model.
        """
        return Lab(self._loaded)

    def encode_prompt(self, messages: Messages) -> EncodedPrompt:
        """The prompt for the model: ids, image spans, ids per text piece, and the text."""
        return self._encode(render(read_messages(messages), self._template))

    def encode_text(self, text: str) -> tuple[int, ...]:
        """The ids of a text as it is: the BOS id, and the text's ids."""
        return (self._tokenizer.bos_id, *self._tokenizer.encode(text))

    def _keep(
        self,
        whole: Callable[[], Kept],
        make_window: Callable[..., Window],
        sampling: SamplingParams,
    ) -> tuple[Kept, Window | None]:
        """What is computed of a prompt at first, and the window that the rest has left."""
        engine, size = self._loaded.engine, self.engine_config.cache_window
        window = make_window(size=size, room=engine.room) if size else None
        kept = window.fit(0) if window else whole()
        engine.check(len(kept.token_ids), sampling, window.limit if window else None)
        return kept, window

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        return self._tokenizer.encode_prompt(
            prompt,
            rows_per_image=self.config.rows_per_image,
            image_token_id=self.config.image_token_id,
        )

    def _open(self, source: ImageSource) -> PixelImage:
        return load_image(source, self.config.vision, self._loaded.image_limits)

    def _image_input(self, picture: PixelImage, start: int) -> ImageInput:
        rows = self.config.rows_per_image
        return ImageInput(torch.from_numpy(picture.values), picture.digest, start, rows)


class _Said(NamedTuple):
    """The text that one id adds to an answer; the last id has the whole `reply` too."""

    text: str
    reply: str = ""


class _TextWatch:
    """Decodes an answer as it grows, in the engine's thread."""

    def __init__(self, answer: AnswerText) -> None:
        self._answer = answer

    def feed(self, token_id: int, *, is_last: bool) -> Heard:
        """The text that is certain with this id; the answer ends where a stop string is whole."""
        text, ends = self._answer.feed(token_id), self._answer.stopped
        if not (ends or is_last):
            return Heard(note=_Said(text))
        return Heard(ends, _Said(text + self._answer.finish(), self._answer.reply))

    def fork(self) -> _TextWatch:
        """A copy, for another branch of the answer."""
        return _TextWatch(self._answer.fork())


class _ReplyReader:
    """Turns one request's events into deltas of text."""

    def __init__(
        self,
        kept: Kept,
        window: Window | None,
        num_images: int,
        shown: tuple[int, int] | None = None,
    ) -> None:
        """`num_images` are those of the whole prompt.

        `shown` is the size of the picture that boxes in the answer are parts of.
        """
        self._kept = kept
        self._window = window
        self._num_images = num_images
        self._shown = shown
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._num_told = 0  # Of the logprobs.

    def __call__(self, event: TokenEvent) -> TextDelta | None:
        self._token_ids.append(event.token_id)
        if event.logprobs:
            self._logprobs.append(event.logprobs)
        said = cast(_Said, event.note)
        usage = self._usage()
        if event.finish_reason is None:
            return TextDelta(said.text, None, self._new_logprobs(), usage) if said.text else None
        reply = Reply(
            said.reply,
            tuple(self._token_ids),
            event.finish_reason,
            usage,
            tuple(self._logprobs) or None,
            find_boxes(said.reply, self._shown) if self._shown else (),
            self._shown,
        )
        return TextDelta(said.text, reply, self._new_logprobs(), usage)

    def _usage(self) -> Usage:
        num_answer = len(self._token_ids)
        kept = self._window.fit(num_answer - 1) if self._window else self._kept
        num_left = self._num_images - len(kept.image_starts)
        return Usage(len(self._kept.token_ids), num_answer, kept.num_tokens, num_left)

    def _new_logprobs(self) -> tuple[TokenLogprobs, ...]:
        first, self._num_told = self._num_told, len(self._logprobs)
        return tuple(self._logprobs[first:])


def _question(given: ImageLike, prompt: str, task: TaskName | None) -> Message:
    return Message("user", (image(given), prompt), task)
