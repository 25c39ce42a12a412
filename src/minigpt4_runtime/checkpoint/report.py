"""The content of a model folder, read from its headers.

Owns   FolderReport: variant, sizes, dtypes and provenance, as JSON and as rows to print.
Takes  a model folder. Answers at once: reads no weight and loads no torch.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minigpt4_runtime.cache.sizes import token_bytes
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.manifest import SourceRecord, read_manifest
from minigpt4_runtime.checkpoint.weights import (
    DTYPE_CODES,
    StoredTensor,
    read_folder_weights,
    show_bytes,
)
from minigpt4_runtime.config import CACHE_DTYPE_NAMES, CacheDTypeName, ModelConfig
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.formats.registry import FormatChoice, format_of, show_formats

_TOWERS = {
    "vision": ("vision.vit.", "vision.ln_vision."),
    "qformer": ("vision.qformer.",),
    "projection": ("vision.projection.",),
    "language": ("language.",),
}
# bfloat16 takes what float16 does, and fp8 what int8 does.
SHOWN_CACHES: tuple[CacheDTypeName, ...] = ("float16", "int8", "int4")
_DTYPE_NAMES: dict[str, str] = {code: name for name, code in DTYPE_CODES.items()}


@dataclass(frozen=True)
class TowerReport:
    """One part of the model: its widths and depths, and how many numbers in how many bytes.

    `formats` are those of its matrices, that with the most bytes first; of floats, their dtype.
    """

    name: str
    sizes: Mapping[str, int]
    num_parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]
    formats: tuple[str, ...]


@dataclass(frozen=True)
class FolderReport:
    """A model folder at a glance. `variant` is "vicuna" (with a Q-Former), "llama2" or "minigptv2".

    `token_bytes` is what a token's keys and values take, by the format of the cache.
    """

    path: str
    variant: str
    template: str
    image_size: int
    rows_per_image: int
    context_length: int
    positions: str
    rope_scaling: dict[str, Any] | None
    vocab_size: int
    token_bytes: Mapping[CacheDTypeName, int]
    towers: tuple[TowerReport, ...]
    num_files: int
    dtypes: tuple[str, ...]
    weight_format: str
    made_by: str
    sources: tuple[SourceRecord, ...]

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(tower.num_parameters for tower in self.towers)

    @property
    def num_bytes(self) -> int:
        """Of all weights together."""
        return sum(tower.num_bytes for tower in self.towers)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for json.dumps."""
        return asdict(self) | {"num_parameters": self.num_parameters, "num_bytes": self.num_bytes}

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of each fact about the whole folder."""
        with_or_without = "with" if self.variant == "vicuna" else "without"
        return [
            ("variant", f"{self.variant} ({with_or_without} a Q-Former)"),
            ("template", self.template),
            ("image", f"{self.image_size} pixels a side, {self.rows_per_image} rows"),
            ("context", f"{self.context_length} tokens, vocabulary {self.vocab_size}"),
            ("positions", self.positions),
            (
                "a GiB holds",
                "keys and values of "
                + ", ".join(
                    f"{2**30 // self.token_bytes[name]:,} tokens in {name}" for name in SHOWN_CACHES
                ),
            ),
            (
                "weights",
                f"{self.weight_format} ({', '.join(self.dtypes)}), files: {self.num_files}",
            ),
            ("made by", self.made_by),
        ]

    def tower_rows(self) -> list[tuple[str, ...]]:
        """A row for each tower: name, sizes, parameters, bytes, formats; the last is the sum."""
        rows = [
            (
                tower.name,
                ", ".join(f"{name} {size}" for name, size in tower.sizes.items()),
                f"{tower.num_parameters:,}",
                show_bytes(tower.num_bytes),
                ", ".join(tower.formats),
            )
            for tower in self.towers
        ]
        return [*rows, ("all", "", f"{self.num_parameters:,}", show_bytes(self.num_bytes), "")]


def inspect_folder(model_dir: Path) -> FolderReport:
    """Look at a model folder.

    Raises:
        CheckpointError: it is none, or a file in it is missing or damaged.
        ConfigError: its config.json holds something that cannot work.
    """
    config, manifest = load_config(model_dir), read_manifest(model_dir)
    stored = read_folder_weights(model_dir)
    return FolderReport(
        path=str(model_dir),
        variant=_name_variant(config),
        template=config.template,
        image_size=config.vision.image_size,
        rows_per_image=config.rows_per_image,
        context_length=config.language.context_length,
        positions=config.language.positions,
        rope_scaling=scaling.to_mapping() if (scaling := config.language.rope_scaling) else None,
        vocab_size=config.language.vocab_size,
        token_bytes={name: token_bytes(config.language, name) for name in CACHE_DTYPE_NAMES},
        towers=tuple(_report_towers(config, stored, manifest.weight_format)),
        num_files=len({place.path for place in stored.values()}),
        dtypes=manifest.dtypes,
        weight_format=show_formats(manifest.weight_format),
        made_by=manifest.made_by,
        sources=manifest.sources,
    )


def _name_variant(config: ModelConfig) -> str:
    if config.qformer is not None:
        return "vicuna"
    return "minigptv2" if config.template == "minigptv2" else "llama2"


def _report_towers(
    config: ModelConfig, stored: Mapping[str, StoredTensor], formats: FormatChoice
) -> Iterator[TowerReport]:
    """Report each tower that this model has."""
    parts = {"vision": config.vision, "qformer": config.qformer, "language": config.language}
    sizes = {
        name: {
            "width": part.hidden_size,
            "layers": part.num_hidden_layers,
            "heads": part.num_attention_heads,
        }
        for name, part in parts.items()
        if part is not None
    }
    sizes["projection"] = {"from": config.projection_width, "to": config.language.hidden_size}
    for name, prefixes in _TOWERS.items():
        if name not in sizes:
            continue
        places = {key: place for key, place in stored.items() if key.startswith(prefixes)}
        codes = sorted({place.dtype_code for place in places.values()})
        yield TowerReport(
            name,
            sizes[name],
            sum(_count_numbers(key, place, formats) for key, place in places.items()),
            sum(place.num_bytes for place in places.values()),
            tuple(_DTYPE_NAMES.get(code, code) for code in codes),
            _list_formats(places, formats),
        )


def _list_formats(places: Mapping[str, StoredTensor], choice: FormatChoice) -> tuple[str, ...]:
    """The formats of matrices, and the dtypes of those of floats, by the bytes of each."""
    num_bytes: Counter[str] = Counter()
    for name, place in places.items():
        # A norm's weight is one row of floats, in any format.
        if len(place.shape) > 1:
            found = format_of(choice, name.rpartition(".")[0])
            dtype = _DTYPE_NAMES.get(place.dtype_code, place.dtype_code)
            num_bytes[dtype if found is DENSE else found.name] += place.num_bytes
    return tuple(name for name, _ in num_bytes.most_common())


def _count_numbers(name: str, place: StoredTensor, formats: FormatChoice) -> int:
    """How many of the model's numbers a tensor stands for."""
    owner, _, part = name.rpartition(".")
    return math.prod(place.shape) * format_of(formats, owner).numbers_per_item.get(part, 1)
