"""Published files → a model folder, shard by shard.

Owns   the order of a conversion: inspect the files, match the weights, write, verify, rename.
Takes  PublishedFiles and the path of the new folder; gives a Conversion.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from minigpt4_runtime.checkpoint.blank_model import ModelWeight, blank_model, list_weights
from minigpt4_runtime.checkpoint.folder import check_target, staged_folder, write_descriptions
from minigpt4_runtime.checkpoint.manifest import Manifest, SourceRecord
from minigpt4_runtime.checkpoint.mapped import DTYPE_NAME_OF
from minigpt4_runtime.checkpoint.weights import WeightForm
from minigpt4_runtime.checkpoint.writer import (
    MAX_SHARD_BYTES,
    NamedWeight,
    total_bytes,
    write_weights,
)
from minigpt4_runtime.config import DTYPE_NAMES, DTypeName, ModelConfig, Range
from minigpt4_runtime.convert.adapters import (
    DEFAULT_ALPHA,
    keep_adapters,
    merge_adapters,
    split_adapters,
)
from minigpt4_runtime.convert.architecture import Published, detect_config
from minigpt4_runtime.convert.delta import add_base, refuse_delta
from minigpt4_runtime.convert.expected import check_preset
from minigpt4_runtime.convert.inventory import Inventory, take_inventory
from minigpt4_runtime.convert.key_map import PARTS
from minigpt4_runtime.convert.language_folder import (
    LanguageFolder,
    find_weights,
    read_language_folder,
)
from minigpt4_runtime.convert.layouts import choose_layout
from minigpt4_runtime.convert.matching import match_weights
from minigpt4_runtime.convert.recipe import Reader, Recipe
from minigpt4_runtime.convert.training import read_training
from minigpt4_runtime.convert.verify import Verification, verify_answers, verify_weights
from minigpt4_runtime.errors import CheckpointError, ConfigError
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.formats.registry import FormatChoice

# A file that holds the first has a language model of its own. If tied, both are one tensor.
_WORD_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


_DOUBT = (
    "{path} names no variant, and is taken for the {title} variant. "
    "For MiniGPT-v2 add --variant minigptv2."
)

# Gets the stage (reading, writing, comparing or computing), the bytes that are read and written in
# all stages so far, and their total.
Progress = Callable[[str, int, int], object]
_warn = partial(warnings.warn, stacklevel=2)  # In the name of the caller.


@dataclass(frozen=True, kw_only=True)
class PublishedFiles:
    """Where the published files lie. `qformer` and `bert_dir` belong to the Vicuna variant.

    `base_dir` is the LLaMA that `language_dir` is added to where it holds a delta. `preset` names
    the published model that they must be; without it any will do. `variant` is vicuna, llama2 or
    minigptv2, where the files do not tell.
    """

    language_dir: Path
    vision: Path
    projection: Path
    qformer: Path | None = None
    bert_dir: Path | None = None
    base_dir: Path | None = None
    preset: str | None = None
    variant: str | None = None


@dataclass(frozen=True)
class Conversion:
    """The result. `variant` is its layout's title; `verification` None where none was asked for.

    `doubt` says that nothing in the files tells the variant from another; else it is empty.
    """

    variant: str
    doubt: str
    config: ModelConfig
    manifest: Manifest
    num_bytes: int
    verification: Verification | None


class _Meter:
    """Adds up bytes for a Progress."""

    def __init__(self, progress: Progress | None, total_bytes: int) -> None:
        self._progress, self._total, self._done = progress, total_bytes, 0
        self._stage = "reading"

    def enter(self, stage: str) -> None:
        self._stage = stage
        self.add(0)

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress is not None:
            self._progress(self._stage, self._done, self._total)


def convert(  # noqa: PLR0913 - all that can be chosen about a conversion.
    files: PublishedFiles,
    out_dir: Path,
    *,
    dtype: DTypeName | None = None,
    image_size: int | None = None,
    lora_alpha: float | None = None,
    keep_lora: bool = False,
    force: bool = False,
    verify: bool = False,
    choose_formats: Callable[[ModelConfig], FormatChoice] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    warn: Callable[[str], None] = _warn,
) -> Conversion:
    """Make a model folder. It gets its name when it is complete, and verified if asked.

    Without `dtype` every weight keeps its published dtype. `choose_formats` says in which formats
    its weights are held; without it they are floats. `warn` gets a text about a language model that
    may be the wrong version. LoRA adapters are merged, with `lora_alpha` in place of training's;
    with `keep_lora` they stay beside the weights, and are added to each product.

    Raises:
        CheckpointError: a file is of another kind or damaged, or the folder cannot be written.
        ConfigError: `dtype`, `image_size`, `lora_alpha` or a format cannot be.
    """
    if verify and choose_formats is not None:
        raise ConfigError(
            "--verify compares floats, and --format rounds them. Convert and verify first, then "
            "run `minigpt4 quantise`."
        )
    if verify and keep_lora and dtype is not None:
        raise ConfigError(
            f"--verify compares with merged weights, which --dtype {dtype} rounds otherwise than "
            "those that --keep-lora keeps apart. Leave one of the three out."
        )
    if dtype not in (None, *DTYPE_NAMES):
        raise ConfigError(f"The dtype is {dtype!r}; it must be one of {', '.join(DTYPE_NAMES)}.")
    if lora_alpha is not None:
        Range(float, above=0).check("lora_alpha", lora_alpha)
    check_target(out_dir, force=force)
    published, doubt = _look_at(files, lora_alpha, keep_lora=keep_lora)
    if text := published.layout.describe_doubt(files.language_dir):
        warn(text)
    config = detect_config(published, image_size)
    if files.preset is not None:
        check_preset(files.language_dir / "config.json", config, files.preset)
    recipes = match_weights(published, config)
    formats = choose_formats(config) if choose_formats else DENSE.name
    weights = {each.name: each for each in list_weights(blank_model(config, formats=formats))}
    forms = {
        name: WeightForm(part.shape, part.dtype or dtype or DTYPE_NAME_OF[each.dtype])
        for weight, each in recipes.items()
        for name, part in weights[weight].parts().items()
    }
    num_bytes, paths = total_bytes(forms), _list_sources(files, published.language_folder)
    _refuse_sources_inside(out_dir, paths)
    # Verification reads the new folder twice: to compare it, and to compute with it.
    source_bytes = sum(each.source_bytes for each in recipes.values())
    verified_bytes = 2 * num_bytes + source_bytes if verify else 0
    source_file_bytes = sum(path.stat().st_size for _, path in paths)
    meter = _Meter(progress, source_file_bytes + num_bytes + verified_bytes)
    verification = None
    with staged_folder(out_dir, needed_bytes=num_bytes, force=force) as folder:
        sources = tuple(SourceRecord.of(role, path, meter.add) for role, path in paths)
        manifest = Manifest.stamp(forms.values(), sources, formats)
        meter.enter("writing")
        write_weights(
            folder, forms, _stream_packed(recipes, weights),
            max_shard_bytes=max_shard_bytes, on_bytes=meter.add,
        )  # fmt: skip
        write_descriptions(folder, config, manifest, published.language_folder.tokenizer_path)
        if verify:
            meter.enter("comparing")
            verify_weights(folder, forms, _stream(recipes), on_bytes=meter.add)
            meter.enter("computing")
            inventories = {**published.parts, "language": published.merged}.values()
            rows, logits = verify_answers(
                folder, config, inventories, dtype=dtype, on_bytes=meter.add
            )
            verification = Verification(len(recipes), rows, logits)
    return Conversion(published.layout.title, doubt, config, manifest, num_bytes, verification)


def _look_at(
    files: PublishedFiles, lora_alpha: float | None, *, keep_lora: bool
) -> tuple[Published, str]:
    """Open every file once, for names and shapes alone; with a sentence about any doubt."""
    if files.bert_dir is not None and files.qformer is None:
        raise CheckpointError(
            "--bert is given without --qformer. Give both (the Vicuna variant) or neither (the "
            "Llama-2 variant)."
        )
    # The small files first, so that a wrong one is found early.
    given = take_inventory(files.projection, [files.projection])
    training = read_training(files.projection)
    # A fine-tune's file may hold more than the projection, up to the whole model.
    own = {role: given.only(PARTS[role]).recipes for role in PARTS}
    folder = read_language_folder(
        files.language_dir, needs_weights=_WORD_TABLE not in own["language"]
    )
    towers = {"qformer": files.qformer, "vision": files.vision}
    parts = {
        role: take_inventory(path, [path]).part(role).overlaid(own[role])
        for role, path in towers.items()
        if path is not None
    }
    factors, own_language = split_adapters(own["language"])
    language = _take_language(files.base_dir, folder).overlaid(own_language)
    if folder.is_tied and _WORD_TABLE in language.recipes:
        language = language.overlaid({_HEAD: language.recipes[_WORD_TABLE]})
    alpha = lora_alpha or training.lora_alpha or DEFAULT_ALPHA
    merged = merge_adapters(language, factors, alpha)
    adapters = keep_adapters(factors, alpha) if keep_lora else None
    if keep_lora and adapters is None:
        raise CheckpointError(
            f"--keep-lora is given, and {files.projection} has no LoRA adapters. Leave it out."
        )
    parts["language"] = merged if adapters is None else language.overlaid(factors)
    parts["projection"] = given.without(*parts)
    layout, is_told = choose_layout(
        parts, variant=files.variant, arch=training.arch, has_adapters=bool(factors)
    )
    doubt = "" if is_told else _DOUBT.format(path=files.projection, title=layout.title)
    return Published(layout, parts, folder, training, files.bert_dir, merged, adapters), doubt


def _take_language(base_dir: Path | None, language: LanguageFolder) -> Inventory:
    """The language model of its folder; a delta is added to its base."""
    shards = take_inventory(language.path, language.weight_paths).part("language")
    if base_dir is not None:
        base = take_inventory(base_dir, find_weights(base_dir))
        refuse_delta(base)
        return add_base(shards, base)
    refuse_delta(shards)
    return shards


def _list_sources(files: PublishedFiles, language: LanguageFolder) -> list[tuple[str, Path]]:
    """Every file that the result depends on, with its role."""
    base_paths = () if files.base_dir is None else find_weights(files.base_dir)
    settings_path = files.language_dir / "config.json"
    listed = [
        *(
            ("language", path)
            for path in (settings_path, language.tokenizer_path, *language.weight_paths)
        ),
        *(("base", path) for path in base_paths),
        ("vision", files.vision),
        ("qformer", files.qformer),
        ("bert", files.bert_dir and files.bert_dir / "config.json"),
        ("projection", files.projection),
    ]
    return [(role, path) for role, path in listed if path is not None]


def _refuse_sources_inside(out_dir: Path, paths: list[tuple[str, Path]]) -> None:
    """A source in the old folder would be deleted when the new folder replaces it."""
    inside = [path for _, path in paths if out_dir.resolve() in path.resolve().parents]
    if inside:
        raise CheckpointError(
            f"{inside[0]} lies in {out_dir}, which --force would replace. Choose another --out."
        )


def _stream(recipes: Mapping[str, Recipe]) -> Iterator[NamedWeight]:
    """Every weight, in order."""
    reader = Reader()
    for name, recipe in recipes.items():
        # No name here holds a tensor: the mapping of a file ends with its last one.
        yield NamedWeight(name, recipe.origin or name, reader.read(recipe))


def _stream_packed(
    recipes: Mapping[str, Recipe], weights: Mapping[str, ModelWeight]
) -> Iterator[NamedWeight]:
    """The parts of every weight, in order."""
    reader = Reader()
    for name, recipe in recipes.items():
        parts = [
            NamedWeight(part, recipe.origin or name, tensor)
            for part, tensor in weights[name].pack(reader.read(recipe)).items()
        ]
        while parts:
            yield parts.pop(0)
