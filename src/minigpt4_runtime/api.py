"""MiniGPT4: the public interface, for users and for the tools of this package.

Owns   the path of a request from messages to a reply. `loaded` owns the model and the engine, and
       `probe` the measuring points.
Takes  messages and images; gives replies, deltas, rows and encoded prompts.
Never  knows HTTP or the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

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
from minigpt4_runtime.convert.fine_tune import own_adapter
from minigpt4_runtime.engine.engine import EngineStats
from minigpt4_runtime.engine.steering import LogitsProcessor
from minigpt4_runtime.engine.steering import NextLogits as NextLogits
from minigpt4_runtime.engine.ticket import Ticket
from minigpt4_runtime.errors import ConfigError, RequestError
from minigpt4_runtime.formats.registry import FormatChoice
from minigpt4_runtime.images.pixels import ImageLimits
from minigpt4_runtime.lab.lab import Lab
from minigpt4_runtime.loaded import DEMO_MODEL_DIR as DEMO_MODEL_DIR
from minigpt4_runtime.loaded import LoadedModel
from minigpt4_runtime.messages import (
    Described,
    Message,
    Reply,
    TaskName,
    TextDelta,
    image,
    read_messages,
)
from minigpt4_runtime.probe import Probe
from minigpt4_runtime.reply import ReplyReader, TextWatch
from minigpt4_runtime.steering import Steering
from minigpt4_runtime.text.answer import AnswerText
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
        self._on_close = ExitStack()
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
        adapters: Mapping[str, str | PathLike[str]] | None = None,
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
            adapter: what `minigpt4 tune` made of this model, a LoRA folder of PEFT, or a .pth of
                the original's training: a projection takes the place of the folder's, LoRA adds to
                its language model.
            adapters: several of them by names of your choice, instead: each request may choose one
                by `adapter=NAME`, and requests of different ones run together.

        Raises:
            ConfigError: a setting has no meaning, or this process is to `follow` another.
            CheckpointError: the folder is incomplete, the named model is not fetched yet, or the
                graph or the adapter is another model's.
            BackendUnavailableError: the device is not on this machine, or has too little memory.
        """
        model_dir = find_model(model) if model is not None else DEMO_MODEL_DIR
        vision = VisionSettings(runtime=vision_runtime, graph=vision_graph, provider=provider)
        # A checkpoint of the original is an adapter's folder until the model is closed, for the
        # laboratory may read weights once more.
        with ExitStack() as stack:

            def own(path: str | PathLike[str]) -> Path:
                return stack.enter_context(own_adapter(Path(path), model_dir))

            source = WeightSource.folder(
                model_dir, rope_scaling=rope_scaling, max_context=max_context,
                adapter=own(adapter) if adapter is not None else None,
                adapters={name: own(path) for name, path in _paths(adapters).items()},
            )  # fmt: skip
            made = cls(
                LoadedModel(
                    source, device=device, dtype=dtype, engine=EngineConfig.read(engine),
                    image_limits=image_limits or ImageLimits(), tensor_parallel=tensor_parallel,
                    vision=vision,
                )
            )  # fmt: skip
            made._on_close = stack.pop_all()
            return made

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
        self._on_close.close()

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
        processors: Sequence[LogitsProcessor] = (),
        branches: Mapping[str, Messages] | None = None,
        adapter: str | None = None,
    ) -> Reply:
        """Ask one question about one image. MiniGPT-v2 knows tasks, such as "grounding"."""
        question = [_question(image, prompt, task)]
        return self.chat(
            question, sampling, processors=processors, branches=branches, adapter=adapter
        )

    def chat(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        processors: Sequence[LogitsProcessor] = (),
        branches: Mapping[str, Messages] | None = None,
        adapter: str | None = None,
    ) -> Reply:
        """Answer the last message of a dialogue, or go on with it where it is the assistant's.

        The reply to a continued answer has only the new text. `processors` and `branches` are those
        of `submit`.

        Raises:
            RequestError: messages, an image or the prompt's length cannot be served, a processor
                fails, or there is no such adapter.
        """
        reply = None
        ticket = self.submit(
            messages, sampling, processors=processors, branches=branches, adapter=adapter
        )
        for delta in ticket:
            reply = delta.reply
        assert reply is not None, "a stream ends with its reply"
        return reply

    def stream(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        adapter: str | None = None,
    ) -> Iterator[TextDelta]:
        """Answer like `chat`, giving the text as it grows. Wrong input is refused at once.

        The last delta carries the finished `reply`. The deltas' texts together are its text, unless
        the model itself writes "Assistant:", up to which a reply is dropped, as in the original.
        """
        return iter(self.submit(messages, sampling, adapter=adapter))

    def submit(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        processors: Sequence[LogitsProcessor] = (),
        branches: Mapping[str, Messages] | None = None,
        adapter: str | None = None,
    ) -> Ticket[TextDelta]:
        """Begin to answer, and give a ticket to read: iterate it, `async for` it, or cancel it.

        The answer grows whether the ticket is read or not; dropping the ticket cancels it.

        Args:
            messages: the dialogue.
            sampling: how ids are chosen.
            processors: functions that are called in order before each id is chosen, each with what
                the one before it made of the logits.
            branches: other prompts by name, which get the same ids; processors see their logits.
                A request with branches has one answer, and no `cache_window` shortens it.
            adapter: the name of one of those that the model was loaded with.
        """
        sampling = sampling or SamplingParams()
        script = write_script(read_messages(messages), self._template)
        steering = Steering.read(
            self._loaded, processors, branches,
            lambda each: render(read_messages(each), self._template),
        )  # fmt: skip
        kept, window = self._keep(
            lambda: Kept.whole(self._encode(script.prompt())),
            partial(dialogue_window, script, self._encode),
            sampling,
            steering,
        )
        last_images = script.images[len(script.images) - len(kept.image_starts) :]
        pictures = [self._loaded.open_image(source) for source in last_images]
        images = tuple(map(self._loaded.image_input, pictures, kept.image_starts))
        before, space = self._tokenizer.encode_begun(script.begun)
        begins_with = None if not before or script.begun[-1].isspace() else space
        answer = AnswerText(
            self._tokenizer, self._template, sampling, before=before, begins_with=begins_with
        )
        shown = pictures[-1].size if pictures and self._template.has_boxes else None
        watch = TextWatch(answer)
        reader = ReplyReader(kept, window, len(script.images), shown)
        return self._loaded.submit(
            kept.token_ids, images, sampling, watch, reader, window,
            processors=steering.processors, beside=steering.open(self._loaded), adapter=adapter,
        )  # fmt: skip

    def submit_raw(
        self,
        text: str,
        pictures: Sequence[ImageLike] = (),
        sampling: SamplingParams | None = None,
        *,
        processors: Sequence[LogitsProcessor] = (),
        branches: Mapping[str, tuple[str, Sequence[ImageLike]]] | None = None,
        adapter: str | None = None,
    ) -> Ticket[TextDelta]:
        """Answer a prompt as it is written: no template and no system text are added.

        `<ImageHere>` is the place of a picture, `<s>` and `</s>` are control ids, and a BOS id
        stands before it all. Give it no text of strangers, who could write these too. The answer
        ends and is trimmed as one to messages; a `cache_window` does not shorten the prompt.
        `processors` and `branches` are as in `submit`; a branch is a raw text and its pictures.

        Raises:
            RequestError: there are not as many places as pictures, or the prompt is too long.
        """
        sampling = sampling or SamplingParams()
        prompt = _raw(text, pictures)
        steering = Steering.read(self._loaded, processors, branches, lambda each: _raw(*each))
        kept = Kept.whole(self._encode(prompt))
        self._loaded.engine.room.check(len(kept.token_ids), sampling, beside=steering.lengths)
        opened = [self._loaded.open_image(source) for source in prompt.images]
        images = tuple(map(self._loaded.image_input, opened, kept.image_starts))
        watch = TextWatch(AnswerText(self._tokenizer, self._template, sampling))
        shown = opened[-1].size if opened and self._template.has_boxes else None
        reader = ReplyReader(kept, None, len(images), shown)
        return self._loaded.submit(
            kept.token_ids, images, sampling, watch, reader,
            processors=steering.processors, beside=steering.open(self._loaded), adapter=adapter,
        )  # fmt: skip

    def submit_text(
        self,
        text: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        adapter: str | None = None,
    ) -> Ticket[TextDelta]:
        """Go on from a text, or its ids, as it is: no template, no images, nothing trimmed.

        It ends at `</s>` and at the strings in `stop`; the template's stops do not apply. The space
        before an answer with a form is left out.

        Raises:
            RequestError: an id is not in the vocabulary, or there are none or too many.
        """
        sampling = sampling or SamplingParams()
        token_ids = self.encode_text(text) if isinstance(text, str) else text
        token_ids = self._loaded.check_ids(token_ids)
        kept, window = self._keep(
            lambda: Kept(token_ids, ()), partial(text_window, token_ids), sampling
        )
        answer = AnswerText(self._tokenizer, None, sampling, before=token_ids, begins_with="")
        watch, reader = TextWatch(answer), ReplyReader(kept, window, num_images=0)
        return self._loaded.submit(
            kept.token_ids, (), sampling, watch, reader, window, adapter=adapter
        )

    def describe_all(
        self,
        images: Iterable[ImageLike],
        prompt: str = DESCRIBE_PROMPT,
        sampling: SamplingParams | None = None,
        *,
        task: TaskName | None = None,
        processors: Sequence[LogitsProcessor] = (),
        branches: Callable[[Any], Mapping[str, Messages]] | None = None,
        adapter: str | None = None,
        is_raw: bool = False,
    ) -> Iterator[Described]:
        """Ask one question about each of any number of images, many at once.

        A raw prompt has `<ImageHere>` in it and is taken as it is, see `submit_raw`.

        Images are opened ahead, in threads, only as many as keep the engine full. Results come as
        they are done. The result of an image that cannot be served has an error. `processors` are
        those of `submit`, and `branches` gives, in such a thread, the branches of an image.

        Raises:
            GrammarError: the schema or regex of `sampling` cannot be followed.
            RequestError: the model knows no such task, or has no such adapter.
        """
        self.prepare(sampling or SamplingParams())
        check_task(task, self._template)
        self._loaded.find_adapter(adapter)

        def submit(image: ImageLike) -> Ticket[TextDelta]:
            steering: dict[str, Any] = {
                "processors": processors,
                "branches": branches(image) if branches else None,
                "adapter": adapter,
            }
            if is_raw:
                return self.submit_raw(prompt, [image], sampling, **steering)
            return self.submit([_question(image, prompt, task)], sampling, **steering)

        return ImageRun(submit, max_running=self.engine_config.max_running).of(images)

    def score(
        self,
        asked: str | Messages,
        candidates: Sequence[str | Sequence[int]],
        pictures: Sequence[ImageLike] = (),
        *,
        adapter: str | None = None,
    ) -> tuple[float, ...]:
        """The log-probability of each candidate answer; see `submit_score`."""
        (scores,) = self.submit_score(asked, candidates, pictures, adapter=adapter)
        return scores

    def submit_score(
        self,
        asked: str | Messages,
        candidates: Sequence[str | Sequence[int]],
        pictures: Sequence[ImageLike] = (),
        *,
        adapter: str | None = None,
    ) -> Ticket[tuple[float, ...]]:
        """Begin to compute the log-probabilities of candidate answers. The ticket gives them once.

        The prompt, messages or a raw text as in `submit_raw`, is computed once for all of them. A
        candidate is a text, or ids. Longer ones have more ids to be unlikely in: divide by their
        number to compare per id. A `cache_window` does not shorten the prompt.

        Raises:
            RequestError: there is no candidate, one has no ids or does not fit, or there is no
                such adapter.
        """
        if isinstance(asked, str):
            prompt = _raw(asked, pictures)
        elif pictures:
            raise RequestError("Messages hold their pictures themselves: leave out pictures.")
        else:
            prompt = render(read_messages(asked), self._template)
        return self._loaded.submit_candidates(prompt, candidates, adapter=adapter)

    @property
    def tasks(self) -> tuple[TaskName, ...]:
        """The tasks that a question may have: MiniGPT-v2's, or none."""
        return self._template.tasks

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that a request may choose."""
        return tuple(name for name, _ in self._loaded.source.adapters)

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
        steering: Steering | None = None,
    ) -> tuple[Kept, Window | None]:
        """What is computed of a prompt at first, and the window that the rest has left."""
        room, size = self._loaded.engine.room, self.engine_config.cache_window
        beside = steering.lengths if steering else ()
        window = make_window(size=size, room=room.num_tokens) if size and not beside else None
        kept = window.fit(0) if window else whole()
        limit = window.limit if window else None
        room.check(len(kept.token_ids), sampling, limit, beside=beside)
        return kept, window

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        return self._loaded.encode_prompt(prompt)


def _question(given: ImageLike, prompt: str, task: TaskName | None) -> Message:
    return Message("user", (image(given), prompt), task)


def _paths(adapters: Mapping[str, str | PathLike[str]] | None) -> dict[str, Path]:
    given = {} if adapters is None else adapters
    if not isinstance(given, Mapping) or not all(
        isinstance(path, str | PathLike) for path in given.values()
    ):
        raise ConfigError("adapters is a mapping from names to paths.")
    return {name: Path(path) for name, path in given.items()}


def _raw(text: str, pictures: Sequence[ImageLike]) -> Prompt:
    return read_raw(text, [image(each) for each in pictures])
