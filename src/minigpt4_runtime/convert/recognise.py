"""Published files on this disk, recognised by their content under any name.

Owns   the marks of a vision tower, a Q-Former, a projection, a shard, a tokenizer and a config.
Takes  a folder and the ModelSources that are wanted; gives a path for each part it finds.
Never  trusts a name where the content decides, and never picks one of two files that differ.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4_runtime.checkpoint.file_kind import is_safetensors, read_head, read_json, refuse_text
from minigpt4_runtime.checkpoint.sources import ModelSources, PublishedPart
from minigpt4_runtime.checkpoint.weights import TensorShape, read_header
from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.convert.expected import has_language_sizes
from minigpt4_runtime.convert.key_map import language_origins
from minigpt4_runtime.convert.language_folder import read_llama_config
from minigpt4_runtime.convert.legacy_pickle import is_legacy
from minigpt4_runtime.convert.published import open_tensors
from minigpt4_runtime.convert.wrapping import plain_names
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.presets import PRESETS
from minigpt4_runtime.text.tokenizer import Tokenizer

# Up to this size are all JSON files and tokenizers, and no weights.
_SMALL_FILE_BYTES = 16 * 2**20
_PUBLISHED_ENDINGS = (".pth", ".bin", ".safetensors", ".model")
# One weight of each kind of file that no other kind has.
_MARKS = {
    "vision": "patch_embed.proj.weight",
    "qformer": "Qformer.bert.encoder.layer.0.attention.self.query.weight",
    "projection": "llama_proj.weight",
}
_WORD_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Recognised:
    """A file of a known kind.

    `kind` is vision, qformer, projection, shard or tokenizer; of JSON files llama, bert or index.
    `shapes` are those of a weight file, `values` the content of a JSON file.
    """

    path: Path
    kind: str
    shapes: Mapping[str, TensorShape]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """The files that play a part, under the names by which a conversion knows them.

    `is_whole`: no file of the part is missing, though names may differ from the table's.
    """

    files: Mapping[str, Path]
    is_whole: bool


def match_parts(
    model: ModelSources, folder: Path, say: Callable[[str], None] = lambda _: None
) -> dict[PublishedPart, Found]:
    """Find the parts of a model in a folder or below it.

    `say` gets a message about files that have a published name and cannot be read.

    Raises:
        CheckpointError: there is no such folder, or it holds two files for one part.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; --from wants one with published files.")
    recognised, damaged = _look_through(folder)
    known = [each for each in recognised if _fits(model, each)]
    names = {file.name for part in model.parts for file in part.files}
    told = [text for path, text in damaged.items()
            if path.name in names or path.suffix in _PUBLISHED_ENDINGS]  # fmt: skip
    if told:
        say(f"Passed over: {' '.join(told)}")
    found = {}
    for part in model.parts:
        if part.role == "language":
            found[part] = _match_language(part, folder, known)
        else:
            path = _choose(folder, part.what, known, part.role)
            files = {} if path is None else {_name_as(part.files[0].name, path): path}
            found[part] = Found(files, is_whole=bool(files))
    return found


def _name_as(name: str, path: Path) -> str:
    """The published name, with the ending that says how the file must be opened."""
    return str(Path(name).with_suffix(".safetensors")) if is_safetensors(read_head(path)) else name


def _look_through(folder: Path) -> tuple[list[Recognised], dict[Path, str]]:
    """The files that are recognised, and a message for each that cannot be read."""
    recognised: list[Recognised] = []
    damaged: dict[Path, str] = {}
    seen = set()
    for path in sorted(folder.rglob("*")):
        # A Hub cache holds each file once and any number of links to it.
        if path.is_file() and path.resolve() not in seen:
            seen.add(path.resolve())
            try:
                each = recognise(path)
            except CheckpointError as error:
                damaged[path] = str(error)
                continue
            if each is not None:
                recognised.append(each)
    return recognised, damaged


def recognise(path: Path) -> Recognised | None:
    """Give the kind of a file, or None where no model is made of it.

    Raises:
        CheckpointError: by its beginning or its name it should be one, and it cannot be read.
    """
    head = read_head(path)
    if head.lstrip().startswith(b"{"):
        return _recognise_json(path)
    if (is_headed := is_safetensors(head)) or head.startswith(b"PK") or is_legacy(head):
        stored = read_header(path) if is_headed else open_tensors(path)
        return _recognise_weights(path, {name: tuple(each.shape) for name, each in stored.items()})
    # What a SentencePiece model begins with: its first piece, in Protocol Buffers' form.
    if head.startswith(b"\x0a") and path.stat().st_size <= _SMALL_FILE_BYTES:
        Tokenizer(path)
        return Recognised(path, "tokenizer", {}, {})
    if path.suffix == ".model":
        refuse_text(path, head)
    elif path.suffix in _PUBLISHED_ENDINGS:
        open_tensors(path)  # Raises the error that fits the file.
    return None


def _recognise_json(path: Path) -> Recognised | None:
    if path.stat().st_size > _SMALL_FILE_BYTES:
        return None
    values = read_json(path)
    weight_map = values.get("weight_map")
    if isinstance(weight_map, dict) and all(isinstance(each, str) for each in weight_map.values()):
        return Recognised(path, "index", {}, values)
    kind = values.get("model_type")
    return Recognised(path, str(kind), {}, values) if kind in ("llama", "bert") else None


def _recognise_weights(path: Path, stored: Mapping[str, TensorShape]) -> Recognised | None:
    shapes = {plain: stored[name] for name, plain in plain_names(stored).items()}
    for kind, mark in _MARKS.items():
        # A projection file may hold a Q-Former of its own beside.
        if mark in shapes and (kind == "projection" or _MARKS["projection"] not in shapes):
            return Recognised(path, kind, shapes, {})
    if any(name == "lm_head.weight" or name.startswith("model.") for name in shapes):
        return Recognised(path, "shard", shapes, {})
    return None


def _fits(model: ModelSources, each: Recognised) -> bool:
    """Whether a file is of this model's sizes, as far as they are known beforehand."""
    if model.preset is None:
        return True
    config = PRESETS[model.preset]
    if each.kind == "projection":
        wanted: object = (config.language.hidden_size, config.projection_width)
        has_adapters = any(".lora_A." in name for name in each.shapes)
        return each.shapes[_MARKS["projection"]] == wanted and has_adapters == (
            config.template == "minigptv2"
        )
    if each.kind == "vision":
        return each.shapes[_MARKS["vision"]][0] == config.vision.hidden_size
    if each.kind == "llama":
        return has_language_sizes(each.values, model.preset)
    if each.kind == "shard":
        # A shard without word table and head may belong to any model of this width.
        table = (config.language.vocab_size, config.language.hidden_size)
        return all(each.shapes.get(name, table) == table for name in _WORD_TABLES)
    if each.kind == "bert" and config.qformer is not None:
        return each.values.get("hidden_size") == config.qformer.hidden_size
    return True


def _choose(folder: Path, what: str, known: list[Recognised], kind: str) -> Path | None:
    """The one file of a kind, or one of several that are the same small file."""
    paths = [each.path for each in known if each.kind == kind]
    small = [path for path in paths if path.stat().st_size <= _SMALL_FILE_BYTES]
    if len(small) == len(paths) and len({path.read_bytes() for path in small}) == 1:
        return paths[0]
    if len(paths) > 1:
        raise CheckpointError(
            f"{folder} holds more than one file that could be {what}: {paths[0]} and {paths[1]}. "
            "Give --from a folder with only one of them."
        )
    return paths[0] if paths else None


def _match_language(part: PublishedPart, folder: Path, known: list[Recognised]) -> Found:
    """The whole language model under any file names, or else the files that are recognised."""
    files = {
        name: path
        for name, kind in (("config.json", "llama"), ("tokenizer.model", "tokenizer"))
        if (path := _choose(folder, f"the language model's {name}", known, kind)) is not None
    }
    if (config_path := files.get("config.json")) is not None:
        values = read_json(config_path)
        config = read_llama_config(config_path, values)
        is_tied = values.get("tie_word_embeddings") is True
        shards = _choose_shards(folder, known, config, is_tied=is_tied)
        if shards and "tokenizer.model" in files:
            return Found({**files, **shards}, is_whole=True)
    return Found({**files, **_match_shards(part, known)}, is_whole=False)


def _match_shards(part: PublishedPart, known: list[Recognised]) -> dict[str, Path]:
    """Single shards of a published model, found by its index or, without one, by their names."""
    wanted = {file.name for file in part.files} - {"config.json", "tokenizer.model"}
    index_name = next((name for name in wanted if name.endswith(".index.json")), None)
    found = {}
    for index in (each for each in known if each.kind == "index"):
        weight_map = index.values["weight_map"]
        if index_name is None or not set(weight_map.values()) <= wanted:
            continue
        found[index_name] = index.path
        for shard_name in set(weight_map.values()):
            names = {name for name, holder in weight_map.items() if holder == shard_name}
            for each in known:
                if each.kind == "shard" and set(each.shapes) == names:
                    found[shard_name] = each.path
    named = {each.path.name: each.path for each in known if each.kind == "shard"}
    return {name: named[name] for name in wanted & named.keys()} | found


def _choose_shards(
    folder: Path, known: list[Recognised], config: LanguageConfig, *, is_tied: bool
) -> dict[str, Path]:
    """Shards that together are the whole language model, under names that say so."""
    needed = {name for origin in language_origins(config).values() for name in origin.names} - (
        {"lm_head.weight"} if is_tied else set()
    )
    shards = [each for each in known if each.kind == "shard" and _is_wide(each, config)]
    # Some publish the same weights in both forms; one of them is enough.
    for pattern, is_wanted in (
        ("model-{}-of-{}.safetensors", True),
        ("pytorch_model-{}-of-{}.bin", False),
    ):
        chosen = [each for each in shards if is_safetensors(read_head(each.path)) == is_wanted]
        names = [name for each in chosen for name in each.shapes if name in needed]
        if len(names) > len(set(names)):
            raise CheckpointError(
                f"{folder} holds the same weights of a language model twice, {names[0]} for one. "
                "Give --from a folder with one language model of this size."
            )
        if set(names) == needed:
            return {
                pattern.format(f"{number:05d}", f"{len(chosen):05d}"): each.path
                for number, each in enumerate(chosen, start=1)
            }
    return {}


def _is_wide(shard: Recognised, config: LanguageConfig) -> bool:
    """Whether the shard is of a model of this width: every weight has it on one side."""
    return all(
        config.hidden_size in shape or name.endswith("rotary_emb.inv_freq")
        for name, shape in shard.shapes.items()
    )
