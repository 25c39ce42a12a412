"""How a language model's rotary positions are stretched beyond the length it was trained on.

Owns   RopeScaling: its fields, which are those of transformers, with their defaults and limits.
Takes  what config.json has as rope_scaling, or text such as "yarn:4".
Never  computes a table: model/rotary.py does.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, cast, get_args

from minigpt4_runtime.errors import ConfigError

RopeKind = Literal["linear", "llama3", "yarn", "ntk"]
_OWN_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "ntk": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate",
    ),
}  # fmt: skip
_REFUSED = {
    "dynamic": "it changes the base of rotary positions as a text grows, but the keys in the cache "
    "are already turned by the base before; ntk:FACTOR has one base from the start",
    "longrope": "it turns all positions differently once a text is longer than those of training, "
    "but the keys in the cache are already turned",
}
# Names beside ours that transformers reads elsewhere, or leaves unread.
_FOREIGN = ("type", "rope_theta", "finetuned", "partial_rotary_factor")
# Kinds that change nothing by a factor of 1; dynamic NTK up to the length of training.
_NOTHING_BY_ONE = (None, "linear", "llama3", "ntk", "dynamic")


def _check(name: str, value: object) -> float:
    """The value of a field, as a float where it is a number that need not be whole."""
    if name == "truncate":
        if isinstance(value, bool):
            return value
        raise ConfigError(f"rope_scaling.truncate is {value!r:.40}; it must be true or false.")
    low, high, wanted = 1e-9, 2.0**31 - 1, "a number above 0"
    if name == "factor":
        low, high, wanted = 1.0, 2.0**20, "a number of at least 1 and not beyond 2**20"
    if is_whole := name == "original_max_position_embeddings":
        wanted = "a whole number above 0"
    is_number = isinstance(value, int if is_whole else (int, float))
    if isinstance(value, bool) or not is_number or not low <= value <= high:  # type: ignore[operator]
        raise ConfigError(f"rope_scaling.{name} is {value!r:.40}; it must be {wanted}.")
    return value if is_whole else float(value)  # type: ignore[arg-type, return-value]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """One kind of stretching, and its numbers. Other kinds' fields stay at their defaults.

    `original_max_position_embeddings` is the length in training. `ntk` is the static kind: a base
    that is larger by factor ** (d / (d - 2)), for heads d wide.
    """

    rope_type: RopeKind
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        """Take the defaults of the kind, and refuse numbers that cannot work."""
        kind = self.rope_type
        if kind in _REFUSED:
            raise ConfigError(
                f"rope_scaling of the kind {kind!r} is not possible: {_REFUSED[kind]}."
            )
        if kind not in _OWN_FIELDS:
            known = ", ".join(get_args(RopeKind))
            raise ConfigError(f"rope_scaling is of the kind {kind!r:.40}; known are {known}.")
        for field in fields(self)[1:]:
            name, value = field.name, getattr(self, field.name)
            if value != field.default and not self._has(name):
                raise ConfigError(f"rope_scaling of the kind {kind!r} has no {name}.")
            if value is not None or name == "factor":
                object.__setattr__(self, name, _check(name, value))
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            smaller, larger = getattr(self, low), getattr(self, high)
            if smaller >= larger:
                raise ConfigError(
                    f"rope_scaling.{low} is {smaller:g}; it must be below {high}, {larger:g}."
                )

    def _has(self, name: str) -> bool:
        return name in ("rope_type", "factor", *_OWN_FIELDS[self.rope_type])

    @classmethod
    def read(cls, given: object) -> Self | None:
        """Take one as it is, from config.json's form, or from text; None where nothing is scaled.

        Example: "yarn:4", "none", {"rope_type": "linear", "factor": 2.0}.

        Raises:
            ConfigError: the kind is unknown or not possible, or a number has no meaning.
        """
        if given is None or isinstance(given, cls):
            return given
        if isinstance(given, str):
            return cls._read_text(given)
        if isinstance(given, Mapping):
            return cls._read_mapping(given)
        raise ConfigError(f"rope_scaling is {given!r:.40}; give named values or text: yarn:4.")

    @classmethod
    def _read_text(cls, text: str) -> Self | None:
        if text == "none":
            return None
        kind, _, number = text.partition(":")
        try:
            factor = float(number)
        except ValueError:
            raise ConfigError(
                f"rope_scaling is {text!r:.40}; give KIND:FACTOR, such as yarn:4, or none."
            ) from None
        return cls(rope_type=cast(RopeKind, kind), factor=factor)

    @classmethod
    def _read_mapping(cls, values: Mapping[str, Any]) -> Self | None:
        kind = values.get("rope_type", values.get("type"))
        if not isinstance(kind, str | None):
            raise ConfigError(f"rope_scaling is of the kind {kind!r:.40}, which is no name.")
        given = {name: value for name, value in values.items() if value is not None}
        if given.get("partial_rotary_factor", 1) != 1:
            raise ConfigError(
                "rope_scaling.partial_rotary_factor turns only a part of each head; 1 is known."
            )
        factor: Any = given.get("factor")
        if kind == "default" or (kind in _NOTHING_BY_ONE and factor == 1):
            return None
        if kind is None and factor is None:
            return None
        known = (*(field.name for field in fields(cls)), *_FOREIGN)
        strange = [name for name in given if name not in known]
        if strange and kind in _OWN_FIELDS:
            raise ConfigError(f"rope_scaling has no setting {strange[0]!r}.")
        own = {name: given[name] for name in _OWN_FIELDS.get(kind or "", ()) if name in given}
        return cls(rope_type=cast(RopeKind, kind), factor=factor, **own)

    def to_mapping(self) -> dict[str, Any]:
        """As config.json has it, for this program and for transformers."""
        return {n: v for n, v in asdict(self).items() if self._has(n) and v is not None}

    @property
    def attention_scale(self) -> float:
        """What YaRN multiplies the turned queries and keys with, each; 1 for other kinds."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    def _magnitude(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0

    def __str__(self) -> str:
        """As the command line takes it, where no other number is given: "yarn:4"."""
        return f"{self.rope_type}:{self.factor:g}"
