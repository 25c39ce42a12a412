"""The options that commands share, each written once.

Owns   ModelOptions, ServedOptions and SamplingOptions, and how a command takes each as one value.
Takes  the values that typer read; gives a loaded model and SamplingParams, which check the values.
Never  checks a single value: only which options go together, named as they are typed.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer

from minigpt4_runtime.cli.terminal import note
from minigpt4_runtime.config import SAMPLING_RANGES, EngineConfig, SamplingParams
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.messages import TaskName
from minigpt4_runtime.report.files import read_text

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4
    from minigpt4_runtime.config import ModelConfig
    from minigpt4_runtime.formats.registry import FormatChoice
    from minigpt4_runtime.images.pixels import ImageLimits
    from minigpt4_runtime.quantise.choice import QuantisePlan


def option(metavar: str, text: str, *names: str, **more: Any) -> Any:
    """An option with a value. `metavar` stands for it in the help, whose sentence is `text`."""
    return typer.Option(*names, metavar=metavar, help=text, **more)


def flag(text: str, *names: str) -> Any:
    """An option without a value. The sentence `text` explains it in the help."""
    return typer.Option(*names, help=text)


THREADS_VARIABLE = "OMP_NUM_THREADS"
DEMO_NOTICE = "The demo model answers: it knows only drawn scenes. Give --model DIR for a real one."


AllowLocalUrls = Annotated[
    bool,
    flag("Fetch from this machine and from private networks too.", "--allow-local-urls"),
]


Task = Annotated[
    TaskName | None,
    typer.Option(
        help="Put the word of this task before each question, as MiniGPT-v2 was taught: `[vqa] …`. "
        "A word that is typed counts.",
    ),
]


CacheWindow = Annotated[
    int | None,
    option(
        "COUNT",
        "Let no dialogue and no answer be too long: keep the prompt's beginning and up to this "
        "many of the last tokens. The oldest turns leave with their pictures.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """The model, and the device and runtime for it, without adapters."""

    model: Annotated[
        Path | None,
        option(
            "DIR",
            "A folder made by `minigpt4 convert`, or the name of a fetched model. Without it "
            "the bundled demo model answers, which knows only drawn scenes. `demo-boxes` is "
            "bundled too, and writes boxes.",
        ),
    ] = None
    device: Annotated[
        str,
        option(
            "DEVICE",
            "auto, cpu, cuda, cuda:INDEX, npu or npu:INDEX; "
            "auto takes the first accelerator, else the CPU.",
        ),
    ] = "auto"
    dtype: Annotated[
        str,
        option(
            "DTYPE", "auto, float32, float16 or bfloat16; auto is float32 on a CPU, else float16."
        ),
    ] = "auto"
    cache_dtype: Annotated[
        str,
        option(
            "DTYPE",
            "How keys and values are kept: auto, float32, float16, bfloat16, int8, int4 or fp8; "
            "auto is as --dtype. int8 takes half of float16, int4 two fifths.",
        ),
    ] = "auto"
    cuda_graphs: Annotated[
        str,
        option(
            "GRAPHS",
            "auto or off; auto launches a step in which all answers go on as one CUDA graph, where "
            "the device can.",
        ),
    ] = "auto"
    tensor_parallel: Annotated[
        int,
        option(
            "COUNT",
            "Divide the language model over this many devices, a process each. The others "
            "are started for you, or all are by torchrun.",
        ),
    ] = 1
    vision_runtime: Annotated[
        str,
        option(
            "RUNTIME",
            "What the image side runs in: auto, torch, onnx or om; auto is what the graph is "
            "for, and torch without --vision-graph.",
        ),
    ] = "auto"
    vision_graph: Annotated[
        Path | None,
        option("PATH", "A folder made by `minigpt4 export vision`, or a file in it."),
    ] = None
    provider: Annotated[
        str | None,
        option(
            "PROVIDER",
            "What ONNX Runtime computes on: cuda, cann, openvino or cpu. Without it, the "
            "first of these that it has.",
        ),
    ] = None
    rope_scaling: Annotated[
        str | None,
        option(
            "KIND:FACTOR",
            "Stretch positions beyond the length of training: yarn:4, linear:2, ntk:2 or llama3:8; "
            "none for not at all. Without it, what the folder's config.json says.",
        ),
    ] = None
    max_context: Annotated[
        int | None,
        option(
            "COUNT",
            "The most tokens of a prompt and its answer together. Without it, as many as "
            "positions reach.",
        ),
    ] = None

    def is_demo(self) -> bool:
        """Whether the model is a bundled one, which knows only drawn scenes.

        Raises:
            CheckpointError: it is the name of a model that was not fetched yet.
        """
        from minigpt4_runtime.checkpoint.shelf import BUNDLED_DIR, find_model

        return self.model is None or find_model(self.model).parent == BUNDLED_DIR

    def follow(self) -> bool:
        """Follow rank 0 if torchrun has started this process for that; return whether it has."""
        if self.tensor_parallel < 2:
            return False
        from minigpt4_runtime import follow

        return follow(self.tensor_parallel)

    def load(
        self,
        *,
        announce_demo: bool = True,
        engine: EngineConfig | None = None,
        image_limits: ImageLimits | None = None,
    ) -> MiniGPT4:
        """Load the model, and say so if it is only a bundled demo model."""
        is_demo = self.is_demo()
        if is_demo and announce_demo:
            note(DEMO_NOTICE)
        from minigpt4_runtime.api import MiniGPT4

        if is_demo and THREADS_VARIABLE not in os.environ:
            import torch

            # Its matrix products are too small to divide: a second thread would only add waits.
            torch.set_num_threads(1)
        # `load` itself refuses a dtype or a runtime that it does not know.
        given = self.arguments(engine)
        return MiniGPT4.load(given.pop("model"), image_limits=image_limits, **given)

    def arguments(self, engine: EngineConfig | None = None) -> dict[str, Any]:
        """These settings as arguments of `MiniGPT4.load`.

        Raises:
            ConfigError: there is no such format of the cache, or no such choice of graphs.
        """
        given = asdict(self)
        del given["cache_dtype"], given["cuda_graphs"]
        return {**given, "engine": self.engine(engine)}

    def engine(self, engine: EngineConfig | None = None) -> EngineConfig:
        """These settings of an engine, or the defaults, with this cache and these graphs.

        Raises:
            ConfigError: there is no such format, or no such choice of graphs.
        """
        return replace(
            engine or EngineConfig(),
            cache_dtype=cast(Any, self.cache_dtype),
            cuda_graphs=cast(Any, self.cuda_graphs),
        )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(PlaceOptions):
    """The model with one adapter or none."""

    adapter: Annotated[
        Path | None,
        option(
            "PATH",
            "What `minigpt4 tune` made of this model, a file or a folder, a LoRA folder of PEFT, "
            "or a .pth of the original's training: answer with its weights.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ServedOptions(PlaceOptions):
    """The model with adapters by name."""

    adapter: Annotated[
        list[str] | None,
        option(
            "[NAME=]PATH",
            "What `minigpt4 tune` made of this model, a file or a folder, a LoRA folder of PEFT, "
            "or a .pth of the original's training. A request whose model is NAME is answered with "
            "it; without a name all are. NAME=PATH may be repeated.",
        ),
    ] = None

    def arguments(self, engine: EngineConfig | None = None) -> dict[str, Any]:
        """See `PlaceOptions`.

        Raises:
            ConfigError: a name is missing or given twice.
        """
        arguments = super().arguments(engine)
        given: list[str] = arguments.pop("adapter") or []
        if len(given) == 1 and (Path(given[0]).exists() or "=" not in given[0]):
            return {**arguments, "adapter": given[0]}
        adapters: dict[str, str] = {}
        for each in given:
            name, equals, path = each.partition("=")
            if not (name and equals and path):
                raise ConfigError(f"--adapter is {each!r}; of several, each is NAME=PATH.")
            if name in adapters:
                raise ConfigError(f"--adapter names {name!r} twice. Give each a name of its own.")
            adapters[name] = path
        return {**arguments, "adapters": adapters}


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How an answer is chosen and how long it may be."""

    max_new_tokens: Annotated[int, option("COUNT", "The longest answer, in tokens.")] = (
        SamplingParams.max_new_tokens
    )
    temperature: Annotated[
        float,
        option("NUMBER", "0 always takes the likeliest word; above 0 it is drawn by lot."),
    ] = SamplingParams.temperature
    top_p: Annotated[
        float,
        option("SHARE", "Draw from the likeliest words that together have this share."),
    ] = SamplingParams.top_p
    top_k: Annotated[
        int,
        option("COUNT", "Draw from this many likeliest words; 0 is no limit."),
    ] = SamplingParams.top_k
    min_p: Annotated[
        float,
        option(
            "SHARE",
            "Draw from the words that have at least this share of the likeliest one's chance.",
        ),
    ] = SamplingParams.min_p
    repetition_penalty: Annotated[
        float, option("NUMBER", "Above 1, words that were said become rarer.")
    ] = SamplingParams.repetition_penalty
    presence_penalty: Annotated[
        float,
        option(
            "NUMBER",
            f"OpenAI's, {SAMPLING_RANGES['presence_penalty']}: above 0, said words become "
            "rarer, once.",
        ),
    ] = SamplingParams.presence_penalty
    frequency_penalty: Annotated[
        float,
        option(
            "NUMBER",
            f"OpenAI's, {SAMPLING_RANGES['frequency_penalty']}: above 0, words become rarer "
            "each time they are said.",
        ),
    ] = SamplingParams.frequency_penalty
    num_beams: Annotated[
        int,
        option("COUNT", "Follow this many answers at once and give the likeliest."),
    ] = SamplingParams.num_beams
    length_penalty: Annotated[
        float | None,
        option(
            "NUMBER", "With beams: above 0 favours long answers, below 0 short ones; 1 without it."
        ),
    ] = None
    seed: Annotated[int | None, option("NUMBER", "The same seed draws the same answer.")] = (
        SamplingParams.seed
    )
    json_schema: Annotated[
        Path | None,
        option("FILE", "Make the answer JSON of the JSON schema in this file."),
    ] = None
    regex: Annotated[str | None, option("REGEX", "Make the whole answer match this.")] = None

    def params(self) -> SamplingParams:
        """These options as the library's SamplingParams.

        Raises:
            ConfigError: a value is not valid, or conflicts with others; a file cannot be read.
        """
        if self.num_beams <= 1 and self.length_penalty is not None:
            raise ConfigError("--length-penalty needs --num-beams above 1: it ranks beams.")
        if self.num_beams > 1 and (self.temperature > 0 or self.min_p > 0):
            drawing = "--temperature" if self.temperature > 0 else "--min-p"
            raise ConfigError(
                f"--num-beams searches and {drawing} draws by lot. Leave one of them out."
            )
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if self.json_schema:
            given["json_schema"] = read_text(self.json_schema)
        return SamplingParams(**given)


WEIGHTS_HELP = (
    "How the language model's layers are held: w8a16, w8a8, w4a16, w4a8, w8a16-sparse24, "
    "w8a8-sparse24 or w8a8-fp8. wN is the bits of a weight; a8 multiplies in 8 bits too, a16 in "
    "floats; sparse24 keeps two weights of four; fp8 are 8-bit floats, for GPUs that multiply them."
)


@dataclass(frozen=True, kw_only=True)
class FormatOptions:
    """What goes with a --format."""

    group_size: Annotated[
        int | None,
        option(
            "COUNT",
            "Inputs that share a scale: 32, 64 or 128. Without it, 8 bits have a scale for each "
            "row, and 4 bits for each 32 inputs.",
        ),
    ] = None
    asymmetric: Annotated[
        bool, flag("Give each scale a zero point, for weights that lean to a side.", "--asymmetric")
    ] = False
    head: Annotated[
        str | None,
        option("FORMAT", "The format of the output matrix, or keep; 8 bits without it."),
    ] = None
    image_side: Annotated[
        str | None,
        option("FORMAT", "The format of the image side, or keep; 8 bits without it."),
    ] = None

    def plan(self, weights: str) -> QuantisePlan:
        """All of it, for the `weights` of a --format."""
        from minigpt4_runtime.quantise.choice import QuantisePlan

        return QuantisePlan(
            weights=weights, group_size=self.group_size, is_symmetric=not self.asymmetric,
            head=self.head, image_side=self.image_side,
        )  # fmt: skip

    def choice(self, weights: str | None) -> Callable[[ModelConfig], FormatChoice] | None:
        """What chooses the formats of a model, or None without a --format.

        Raises:
            ConfigError: an option is given that needs a --format.
        """
        if weights is None:
            if self != FormatOptions():
                raise ConfigError(
                    "--group-size, --asymmetric, --head and --image-side go with --format."
                )
            return None
        from minigpt4_runtime.quantise.choice import choose

        return functools.partial(choose, self.plan(weights))


def spread_options(command: Callable[..., None]) -> Callable[..., None]:
    """Show typer the fields of each option class that `command` takes, as options of their own.

    Example: `def chat(*, where: ModelOptions)` gets --model, --device and --dtype.
    """
    groups: dict[str, type[Any]] = {}
    parameters = []
    for parameter in _parameters(command):
        hint = parameter.annotation
        if isinstance(hint, type) and is_dataclass(hint):
            groups[parameter.name] = hint
            parameters += _parameters(hint)
        else:
            parameters.append(parameter)

    @functools.wraps(command)
    def spread(**values: Any) -> None:
        for name, group in groups.items():
            members = {field.name: values.pop(field.name) for field in fields(group)}
            values[name] = group(**members)
            if isinstance(values[name], PlaceOptions) and values[name].follow():
                return  # Rank 0 does the job.
        command(**values)

    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {each.name: each.annotation for each in parameters}
    return spread


def _parameters(called: Callable[..., object]) -> list[inspect.Parameter]:
    hints = get_type_hints(called, include_extras=True)
    signature = inspect.signature(called)
    return [each.replace(annotation=hints[each.name]) for each in signature.parameters.values()]
