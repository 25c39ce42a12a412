"""The settings of a model, of its engine and of sampling: frozen and strict.

Owns   ModelConfig (vision, qformer, language), VisionSettings, EngineConfig and SamplingParams, and
       their reading from mappings.
Takes  plain mappings, as json.load gives them; field names are Hugging Face's where it has one.
Never  reads a file or the environment, and never lets an unknown setting pass in silence.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, Self, get_args

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.rope_scaling import RopeScaling

DTypeName = Literal["float32", "float16", "bfloat16"]
DTYPE_NAMES: tuple[DTypeName, ...] = get_args(DTypeName)
DTYPE_BYTES: dict[DTypeName, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
# How keys and values are kept. "fp8" is torch.float8_e4m3fn.
CacheDTypeName = Literal["float32", "float16", "bfloat16", "int8", "int4", "fp8"]
CACHE_DTYPE_NAMES: tuple[CacheDTypeName, ...] = get_args(CacheDTypeName)
GrammarKind = Literal["json_schema", "regex"]
VisionRuntimeName = Literal["auto", "torch", "onnx", "om"]
GraphsName = Literal["auto", "off"]

# OpenAI CLIP's statistics, which the original uses (minigpt4/processors/blip_processors.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# A larger size is an error: no dimension of a tensor is so long.
_LARGEST_SIZE = 2**31 - 1


def check_field_names(values: Mapping[str, Any], known: tuple[str, ...], owner: str) -> None:
    """Refuse a setting that does not exist, and name the nearest that does.

    Raises:
        ConfigError: `values` holds a key that is not in `known`.
    """
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."
            raise ConfigError(f"{owner} has no setting {name!r}.{hint}")


class _Settings:
    """Strict reading from a mapping, shared by every frozen settings class below."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values; unknown or missing names are a ConfigError."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.__name__} wants named settings, not {type(values).__name__}.")
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        check_field_names(values, tuple(fields), cls.__name__)
        missing = [
            name
            for name, f in fields.items()
            if name not in values and f.default is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{cls.__name__} lacks {', '.join(missing)}.")
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values that `from_mapping` reads back unchanged."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True)
class Range:
    """The allowed numbers of a setting: from `low`, or `above` it, to `high`."""

    kind: type[int] | type[float]
    low: int | None = None
    high: int | None = None
    above: int | None = None

    @property
    def bounds(self) -> dict[str, Any]:
        """Its ends, by their names in pydantic."""
        ends = {"gt": self.above, "ge": self.low, "le": self.high}
        return {name: end for name, end in ends.items() if end is not None}

    def __str__(self) -> str:
        """The requirement in words: "a whole number ≥ 1", "from 0 to 1"."""
        number = "a whole number " if self.kind is int else ""
        if self.above is not None:
            return f"above {self.above}" + (f" and at most {self.high}" if self.high else "")
        if self.high is None:
            return f"{number or 'a number '}≥ {self.low}"
        return f"{number}from {self.low} to {self.high}"

    def check(self, name: str, value: object) -> None:
        """Refuse a value that is not in this range.

        Raises:
            ConfigError: it is too small, too large, or no number of this kind.
        """
        is_number = isinstance(value, int if self.kind is int else (int, float))
        # A divisor barely above 0 would overflow, and no setting is beyond 2**63.
        low = self.low if self.above is None else self.above + 1e-9
        high = 2.0**63 if self.high is None else self.high
        if isinstance(value, bool) or not is_number or not low <= value <= high:  # type: ignore[operator]
            is_huge = isinstance(value, (int, float)) and abs(value) > 2**63
            seen = "too large" if is_huge else repr(value)
            raise ConfigError(f"{name} is {seen}; it must be {self}.")


def _check_size(name: str, value: int) -> None:
    """A size must be a whole number of at least one."""
    Range(int, 1).check(name, value)
    if value > _LARGEST_SIZE:
        raise ConfigError(f"{name} is above {_LARGEST_SIZE}.")


def _check_numbers(owner: Any) -> None:
    """Every int field must be a size, and every float field a finite number above zero."""
    for field in dataclasses.fields(owner):
        name, value = f"{type(owner).__name__}.{field.name}", getattr(owner, field.name)
        if field.type is int:
            _check_size(name, value)
        elif field.type is float:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 < value < _LARGEST_SIZE:
                raise ConfigError(f"{name} is {value!r:.80}; it must be a number above 0.")


@dataclass(frozen=True, kw_only=True)
class VisionConfig(_Settings):
    """EVA-ViT: the image tower. The defaults are EVA-CLIP-g's, but for the depth and the widths."""

    image_size: int
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float = 1e-6
    ln_vision_eps: float = 1e-5
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        """Check what the shapes alone can tell."""
        _check_numbers(self)
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision hidden_size {self.hidden_size} does not divide into "
                f"{self.num_attention_heads} heads."
            )
        for name in ("image_mean", "image_std"):
            numbers = tuple(getattr(self, name))
            if len(numbers) != 3 or not all(isinstance(each, (int, float)) for each in numbers):
                raise ConfigError(f"VisionConfig.{name} must be three numbers, for R, G and B.")
            object.__setattr__(self, name, numbers)

    @property
    def num_patches(self) -> int:
        """Rows of the tower without the class row: 256 at 224 px and patch 14."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class QFormerConfig(_Settings):
    """BLIP-2's Q-Former: learned queries that read the tower through cross-attention."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_query_tokens: int
    cross_attention_frequency: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        """Check what the shapes alone can tell."""
        _check_numbers(self)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"Q-Former hidden_size {self.hidden_size} does not divide into "
                f"{self.num_attention_heads} heads."
            )


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA's changes to a language model that are kept beside its weights.

    `ranks` are those of the changed weights, by their names in the language model; each change
    B·A counts `alpha` / rank.
    """

    alpha: float
    ranks: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        """Check the numbers."""
        Range(float, above=0).check("adapters.alpha", self.alpha)
        for name, rank in self.ranks:
            _check_size(f"The rank of the adapter {name!r:.80}", rank)

    @classmethod
    def read(cls, given: object) -> Self | None:
        """Take one as it is, or from config.json's form: {"alpha": 16.0, "ranks": {…}}.

        Raises:
            ConfigError: it has another form, or a number has no meaning.
        """
        if given is None or isinstance(given, cls):
            return given
        if not isinstance(given, Mapping) or not isinstance(given.get("ranks"), Mapping):
            raise ConfigError(f"adapters is {given!r:.80}; alpha and ranks by names are wanted.")
        check_field_names(given, ("alpha", "ranks"), "adapters")
        if "alpha" not in given:
            raise ConfigError("adapters lacks alpha.")
        return cls(given["alpha"], tuple(given["ranks"].items()))

    def to_mapping(self) -> dict[str, Any]:
        """Plain values that `read` reads back unchanged."""
        return {"alpha": self.alpha, "ranks": dict(self.ranks)}


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(_Settings):
    """A Llama-family language model.

    `rope_scaling` stretches its positions; also given as a mapping or as text, such as "yarn:4". A
    static NTK is another base and nothing else, so it goes into `rope_theta` and
    `max_position_embeddings` at once. `max_context` limits the tokens of a sequence further.
    `adapters` are also given as a mapping.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float = 10000.0
    model_type: Literal["llama"] = "llama"
    rope_scaling: RopeScaling | None = None
    max_context: int | None = None
    adapters: AdapterConfig | None = None

    def __post_init__(self) -> None:
        """Check what the shapes alone can tell."""
        _check_numbers(self)
        if self.model_type != "llama":
            raise ConfigError(
                f"The language model is of type {self.model_type!r}; only 'llama' is known."
            )
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ConfigError(
                f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} "
                "heads of an even width, which rotary positions need."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key/value heads evenly."
            )
        self._take_scaling()
        object.__setattr__(self, "adapters", AdapterConfig.read(self.adapters))
        if self.max_context is not None:
            _check_size("max_context", self.max_context)
            if self.max_context > self._reach:
                raise ConfigError(
                    f"max_context is {self.max_context}, but the positions of this model reach "
                    f"{self._reach} tokens. Lower it, or stretch them with rope_scaling, such as "
                    "yarn:4."
                )

    def _take_scaling(self) -> None:
        """Read the scaling, and give it the length of training where it needs one."""
        scaling = RopeScaling.read(self.rope_scaling)
        if scaling is not None and scaling.rope_type == "ntk":
            if self.head_dim == 2:
                raise ConfigError("rope_scaling by ntk needs heads wider than 2.")
            base = self.rope_theta * scaling.factor ** (self.head_dim / (self.head_dim - 2))
            object.__setattr__(self, "rope_theta", base)
            length = int(self.max_position_embeddings * scaling.factor)
            object.__setattr__(self, "max_position_embeddings", length)
            scaling = None
            _check_numbers(self)
        elif scaling is not None and scaling.rope_type != "linear":
            length = scaling.original_max_position_embeddings or self.max_position_embeddings
            scaling = dataclasses.replace(scaling, original_max_position_embeddings=length)
            if scaling.rope_type == "yarn" and self.rope_theta <= 1:
                raise ConfigError(
                    f"rope_scaling by yarn needs a rope_theta above 1; it is {self.rope_theta}."
                )
        object.__setattr__(self, "rope_scaling", scaling)
        _check_size("The context that rope_scaling gives", self._reach)

    def stretched(self, rope_scaling: object = None, max_context: int | None = None) -> Self:
        """With another scaling of the length of training, or another limit; None changes nothing.

        Raises:
            ConfigError: a value has no meaning, or the limit is beyond the positions.
        """
        changed = self
        if rope_scaling is not None:
            changed = dataclasses.replace(
                self,
                rope_scaling=RopeScaling.read(rope_scaling),
                max_position_embeddings=self.trained_length,
                max_context=None,
            )
        if max_context is None:
            return changed
        return dataclasses.replace(changed, max_context=max_context)

    def to_mapping(self) -> dict[str, Any]:
        """See `_Settings`; without the three settings at the end where they are None."""
        values = super().to_mapping()
        values["rope_scaling"] = self.rope_scaling.to_mapping() if self.rope_scaling else None
        values["adapters"] = self.adapters.to_mapping() if self.adapters else None
        optional = ("rope_scaling", "max_context", "adapters")
        return {n: value for n, value in values.items() if n not in optional or value is not None}

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def context_length(self) -> int:
        """How many tokens a sequence may have."""
        return self._reach if self.max_context is None else self.max_context

    @property
    def positions(self) -> str:
        """How its positions are told apart, in words."""
        words = f"rotary, base {self.rope_theta:g}"
        if self.rope_scaling is None:
            return words
        return f"{words}, stretched by {self.rope_scaling} from {self.trained_length} tokens"

    @property
    def trained_length(self) -> int:
        """How many tokens a sequence had at most in training, as far as the settings tell."""
        original = self.rope_scaling and self.rope_scaling.original_max_position_embeddings
        return original or self.max_position_embeddings

    @property
    def _reach(self) -> int:
        """How far the positions reach: published configs state it, or the length of training."""
        if self.rope_scaling is None or self.max_position_embeddings > self.trained_length:
            return self.max_position_embeddings
        return int(self.trained_length * self.rope_scaling.factor)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole model. Without a `qformer`, groups of patches are projected."""

    vision: VisionConfig
    qformer: QFormerConfig | None
    language: LanguageConfig
    template: str
    patches_per_row: int = 4

    def __post_init__(self) -> None:
        """Check that the parts fit each other."""
        _check_numbers(self)
        if self.qformer is None and self.vision.num_patches % self.patches_per_row:
            raise ConfigError(
                f"{self.vision.num_patches} patches do not divide into groups of "
                f"{self.patches_per_row}."
            )

    @property
    def rows_per_image(self) -> int:
        """How many rows one image gives to the language model: 32 or 64 in the published models."""
        if self.qformer is not None:
            return self.qformer.num_query_tokens
        return self.vision.num_patches // self.patches_per_row

    @property
    def projection_width(self) -> int:
        """The width of its input: a query, or a group of patches side by side."""
        if self.qformer is not None:
            return self.qformer.hidden_size
        return self.vision.hidden_size * self.patches_per_row

    @property
    def image_token_id(self) -> int:
        """The id that holds an image row's place: the first one past the vocabulary."""
        return self.language.vocab_size

    def to_mapping(self) -> dict[str, Any]:
        """The content of config.json, in Hugging Face's form."""
        return {
            "architectures": ["MiniGPT4ForConditionalGeneration"],
            "model_type": "minigpt4",
            "template": self.template,
            "patches_per_row": self.patches_per_row,
            "vision_config": self.vision.to_mapping(),
            "qformer_config": self.qformer.to_mapping() if self.qformer else None,
            "text_config": self.language.to_mapping(),
        }

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Read the content of config.json.

        Raises:
            ConfigError: a name is unknown or missing, or the parts do not fit each other.
        """
        known = (
            "architectures", "model_type", "template", "patches_per_row",
            "vision_config", "qformer_config", "text_config",
        )  # fmt: skip
        check_field_names(values, known, "config.json")
        missing = [name for name in known if name not in values]
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}.")
        if values["model_type"] != "minigpt4":
            raise ConfigError(
                f"config.json is of model_type {values['model_type']!r}, not 'minigpt4'. "
                "Convert the published files with `minigpt4 convert` first."
            )
        qformer = values["qformer_config"]
        return cls(
            vision=VisionConfig.from_mapping(values["vision_config"]),
            qformer=QFormerConfig.from_mapping(qformer) if qformer is not None else None,
            language=LanguageConfig.from_mapping(values["text_config"]),
            template=values["template"],
            patches_per_row=values["patches_per_row"],
        )


@dataclass(frozen=True, kw_only=True)
class VisionSettings:
    """The runtime of the image side: a graph, made by `minigpt4 export vision`, or torch.

    `graph` is the folder or a file in it; auto is its own runtime, or torch without a graph.
    `provider` is the provider of ONNX Runtime.
    """

    runtime: VisionRuntimeName = "auto"
    graph: str | PathLike[str] | None = None
    provider: str | None = None

    def __post_init__(self) -> None:
        """A runtime needs a graph or none, and only a graph has a provider."""
        known = get_args(VisionRuntimeName)
        if self.runtime not in known:
            raise ConfigError(
                f"vision_runtime is {self.runtime!r}; it must be one of {', '.join(known)}."
            )
        if self.runtime in ("onnx", "om") and self.graph is None:
            raise ConfigError(
                f"vision_runtime is {self.runtime!r}, which needs a graph. Make one with `minigpt4 "
                "export vision`, and name its folder as vision_graph."
            )
        if self.runtime == "torch" and self.graph is not None:
            raise ConfigError(
                "vision_runtime is 'torch', which runs no graph: leave out one of vision_runtime "
                "and vision_graph."
            )
        if self.provider is not None and self.graph is None:
            raise ConfigError(
                f"provider is {self.provider!r}, and there is no graph to run on it: name one as "
                "vision_graph."
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig(_Settings):
    """How many requests run at once, and the caches between them.

    A step computes at most `max_step_tokens` tokens of at most `max_running` answers (each beam
    counts). Keys and values lie in blocks of `block_size` tokens; `num_blocks` None takes as many
    as the free memory allows and all answers could fill, and `cache_dtype` "auto" keeps them in the
    dtype that the model computes in; int8, int4 and fp8 take less memory, and change answers a
    little (docs/engine.md). `prefix_cache` keeps them findable for
    prompts that begin alike, and `image_cache_bytes` limits the kept rows of images.
    `cuda_graphs` "auto" launches a step in which all sequences decode as one graph, where the
    device and its attention kernel can, and the image side in torch.

    With a `cache_window` no dialogue and no answer is too long: what a prompt begins with stays,
    and so do up to this many of the last tokens. The oldest turns leave with their pictures.
    """

    max_running: int = 64
    max_step_tokens: int = 512
    block_size: int = 16
    num_blocks: int | None = None
    cache_dtype: CacheDTypeName | Literal["auto"] = "auto"
    prefix_cache: bool = True
    image_cache_bytes: int = 256 * 2**20
    cache_window: int | None = None
    cuda_graphs: GraphsName = "auto"

    @classmethod
    def read(cls, given: "EngineConfig | Mapping[str, Any] | None") -> "EngineConfig":
        """Take a config as it is, a mapping as its settings, and None as the defaults."""
        return given if isinstance(given, EngineConfig) else cls.from_mapping(given or {})

    def __post_init__(self) -> None:
        """Refuse values that cannot work, by name."""
        for name in ("max_running", "max_step_tokens", "block_size", "num_blocks", "cache_window"):
            if name not in ("num_blocks", "cache_window") or getattr(self, name) is not None:
                _check_size(f"EngineConfig.{name}", getattr(self, name))
        if self.max_step_tokens < self.max_running:
            raise ConfigError(
                f"EngineConfig.max_step_tokens is {self.max_step_tokens}, but {self.max_running} "
                "answers at once take a token each. Raise it or lower max_running."
            )
        if self.cache_dtype not in ("auto", *CACHE_DTYPE_NAMES):
            raise ConfigError(
                f"EngineConfig.cache_dtype is {self.cache_dtype!r}; it must be auto or "
                f"{', '.join(CACHE_DTYPE_NAMES)}."
            )
        if self.cuda_graphs not in get_args(GraphsName):
            raise ConfigError(
                f"EngineConfig.cuda_graphs is {self.cuda_graphs!r}; it must be auto or off."
            )
        if not isinstance(self.prefix_cache, bool):
            raise ConfigError(
                f"EngineConfig.prefix_cache is {self.prefix_cache!r}; it must be True or False."
            )
        Range(int, 0).check("EngineConfig.image_cache_bytes", self.image_cache_bytes)

    def check_window(self, max_context: int) -> None:
        """Refuse a window that no model of this context, or no cache of these blocks, can hold.

        Raises:
            ConfigError: the window is larger.
        """
        room = max_context
        if self.num_blocks is not None:
            room = min(room, self.num_blocks * self.block_size)
        if self.cache_window is not None and self.cache_window >= room:
            holder = "model's context" if room == max_context else "cache (num_blocks)"
            raise ConfigError(
                f"cache_window is {self.cache_window}, but the {holder} holds {room} tokens, and "
                "what a prompt begins with takes some of them. Lower it."
            )


# The command line, the server and the chat page read these too.
SAMPLING_RANGES = {
    "max_new_tokens": Range(int, 1),
    "min_new_tokens": Range(int, 0),
    "temperature": Range(float, 0),
    "top_p": Range(float, above=0, high=1),
    "top_k": Range(int, 0),
    "min_p": Range(float, 0, 1),
    "repetition_penalty": Range(float, above=0),
    "presence_penalty": Range(float, -2, 2),
    "frequency_penalty": Range(float, -2, 2),
    "num_beams": Range(int, 1),
    "length_penalty": Range(float, -10, 10),
    "seed": Range(int, 0, 2**63 - 1),
    "logprobs": Range(int, 0, 20),
}
LOGIT_BIAS_RANGE = Range(float, -100, 100)


@dataclass(frozen=True, kw_only=True)
class SamplingParams(_Settings):
    """How the next token is chosen and when an answer ends. Greedy unless asked otherwise.

    SAMPLING_RANGES has the numbers that are allowed. `stop` None means the template's own stops,
    `()` nothing but `</s>`, and strings are added to the template's. `top_k` 0 means no limit.
    `min_new_tokens` only forbids `</s>`: a stop string may end an answer earlier. The same seed
    gives the same answer. `logprobs` asks for the log-probability of each chosen token and of so
    many of the likeliest ones. `min_p` drops ids that are less likely than this share of the
    likeliest one. The penalties of presence and frequency and `logit_bias` are OpenAI's; the last
    maps ids to numbers that are added to their logits.

    With a `json_schema`, as a mapping or as text, the answer is JSON of that form, with the
    properties that it lists and no others unless it has `additionalProperties` or combines schemas;
    with a `regex` the whole answer matches it, but for space at its ends, which every reply leaves
    out. The template's stop strings are then text like any other.
    """

    max_new_tokens: int = 300
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    num_beams: int = 1
    length_penalty: float = 1.0
    stop: tuple[str, ...] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that have no meaning, by name."""
        for name, allowed in SAMPLING_RANGES.items():
            value = getattr(self, name)
            if value is not None or name not in ("seed", "logprobs"):
                allowed.check(name, value)
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens is {self.min_new_tokens}, above max_new_tokens "
                f"{self.max_new_tokens}. Lower the first or raise the second."
            )
        for name in ("temperature", "min_p"):
            if self.num_beams > 1 and getattr(self, name) > 0:
                raise ConfigError(
                    f"Beam search does not sample: set {name} to 0 or num_beams to 1."
                )
        if self.num_beams > 1 and self.logprobs is not None:
            raise ConfigError(
                "Beam search gives no logprobs: set logprobs to None or num_beams to 1."
            )
        if not isinstance(self.ignore_eos, bool):
            raise ConfigError(f"ignore_eos is {self.ignore_eos!r}; it must be True or False.")
        self._check_stop()
        self._check_logit_bias()
        self._check_grammar()

    @property
    def grammar(self) -> tuple[GrammarKind, str] | None:
        """The kind and the text of the answer's form; None if it is free."""
        if self.json_schema is not None:
            return "json_schema", str(self.json_schema)
        return ("regex", self.regex) if self.regex is not None else None

    def _check_stop(self) -> None:
        if self.stop is None:
            return
        if isinstance(self.stop, str):
            raise ConfigError(f"stop is {self.stop!r}; give a tuple of strings: ({self.stop!r},).")
        if not isinstance(self.stop, (tuple, list)) or not all(
            isinstance(text, str) and text for text in self.stop
        ):
            raise ConfigError(f"stop is {self.stop!r}; it must be a tuple of non-empty strings.")
        object.__setattr__(self, "stop", tuple(self.stop))

    def _check_logit_bias(self) -> None:
        try:
            biases = tuple(sorted(dict(self.logit_bias).items()))
        except (TypeError, ValueError):
            raise ConfigError(
                f"logit_bias is {self.logit_bias!r}; it must map token ids to numbers."
            ) from None
        for token_id, bias in biases:
            Range(int, 0).check("logit_bias key", token_id)
            LOGIT_BIAS_RANGE.check(f"logit_bias of {token_id}", bias)
        object.__setattr__(self, "logit_bias", biases)

    def _check_grammar(self) -> None:
        if isinstance(self.json_schema, Mapping):
            try:
                text = json.dumps(self.json_schema)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"json_schema is no JSON: {error}.") from None
            object.__setattr__(self, "json_schema", text)
        for name in ("json_schema", "regex"):
            if not isinstance(value := getattr(self, name), str | None):
                raise ConfigError(f"{name} is of type {type(value).__name__}; it must be text.")
        if self.json_schema is not None and self.regex is not None:
            raise ConfigError("json_schema and regex are both given: an answer has one form.")
        if self.grammar and self.ignore_eos:
            raise ConfigError("ignore_eos is True, but a json_schema or regex says where to end.")
