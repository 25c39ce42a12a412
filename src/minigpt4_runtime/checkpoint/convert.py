"""Published files → a model folder, shard by shard.

Owns   the order of a conversion: look, decide, write, verify, and only then give it its name.
Takes  PublishedFiles and where the folder shall be; gives a Conversion.
Never  holds more than one published file open, nor more than one piece of one weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from minigpt4_runtime.checkpoint.architecture import Published, detect_config
from minigpt4_runtime.checkpoint.expected import check_preset
from minigpt4_runtime.checkpoint.folder import check_target, staged_folder, write_descriptions
from minigpt4_runtime.checkpoint.language_folder import read_language_folder
from minigpt4_runtime.checkpoint.manifest import Manifest, SourceRecord
from minigpt4_runtime.checkpoint.plan import ConversionPlan, make_plan
from minigpt4_runtime.checkpoint.source import open_tensors, take_inventory
from minigpt4_runtime.checkpoint.verify import Verification, verify_answers, verify_weights
from minigpt4_runtime.checkpoint.writer import (
    MAX_SHARD_BYTES,
    NamedWeight,
    total_bytes,
    write_weights,
)
from minigpt4_runtime.config import DTYPE_NAMES, DTypeName, ModelConfig
from minigpt4_runtime.errors import CheckpointError, ConfigError


class Progress(Protocol):
    """Hears how far a conversion is."""

    def __call__(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        """`done_bytes` of `total_bytes` have been read or written; `stage` says what for.

        It is reading, writing, comparing or computing. The bytes count through all of them.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PublishedFiles:
    """Where the published files lie. `qformer` and `bert_dir` belong to the Vicuna variant.

    `preset` names the published model that they must be; without it any will do.
    """

    language_dir: Path
    vision: Path
    projection: Path
    qformer: Path | None = None
    bert_dir: Path | None = None
    preset: str | None = None


@dataclass(frozen=True)
class Conversion:
    """What came of it. `verification` is None where none was asked for."""

    config: ModelConfig
    manifest: Manifest
    num_bytes: int
    verification: Verification | None


class _Meter:
    """Adds up bytes for whoever watches."""

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


def convert(
    files: PublishedFiles,
    out_dir: Path,
    *,
    dtype: DTypeName | None = None,
    image_size: int | None = None,
    force: bool = False,
    verify: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Conversion:
    """Make a model folder. It appears under its name when it is whole, and verified if asked.

    Without `dtype` every weight keeps the dtype that it was published in.

    Raises:
        CheckpointError: a file is not what it should be, or the folder cannot be written.
        ConfigError: `dtype` or `image_size` cannot be.
    """
    if dtype not in (None, *DTYPE_NAMES):
        raise ConfigError(f"The dtype is {dtype!r}; it must be one of {', '.join(DTYPE_NAMES)}.")
    check_target(out_dir, force=force)
    published = _look_at(files)
    config = detect_config(published, image_size)
    if files.preset is not None:
        check_preset(files.language_dir / "config.json", config, files.preset)
    plan = make_plan(published, config, dtype)
    num_bytes, paths = total_bytes(plan.forms), _list_sources(files, published)
    _refuse_sources_inside(out_dir, paths)
    # Verifying reads what was written once to compare it and once to compute with it.
    verified_bytes = 2 * num_bytes + plan.source_bytes if verify else 0
    source_file_bytes = sum(path.stat().st_size for _, path in paths)
    meter = _Meter(progress, source_file_bytes + num_bytes + verified_bytes)
    with staged_folder(out_dir, needed_bytes=num_bytes, force=force) as folder:
        sources = tuple(SourceRecord.of(role, path, meter.add) for role, path in paths)
        manifest = Manifest.stamp(plan.forms.values(), sources)
        meter.enter("writing")
        write_weights(
            folder,
            plan.forms,
            _stream(plan),
            max_shard_bytes=max_shard_bytes,
            on_bytes=meter.add,
        )
        tokenizer_path = published.language_folder.tokenizer_path
        write_descriptions(folder, plan.config, manifest, tokenizer_path)
        verification = _verify(folder, plan, published, dtype, meter) if verify else None
    return Conversion(plan.config, manifest, num_bytes, verification)


def _look_at(files: PublishedFiles) -> Published:
    """Open every file once, for names and shapes alone."""
    if files.bert_dir is not None and files.qformer is None:
        raise CheckpointError(
            "--bert is given without --qformer. Give both (the Vicuna variant) or neither (the "
            "Llama-2 variant)."
        )
    # The small files first: a wrong one should not be found after minutes.
    language = read_language_folder(files.language_dir)
    qformer = files.qformer
    return Published(
        language_folder=language,
        projection=take_inventory(files.projection, [files.projection]),
        qformer=None if qformer is None else take_inventory(qformer, [qformer]),
        bert_dir=files.bert_dir,
        vision=take_inventory(files.vision, [files.vision]),
        language=take_inventory(files.language_dir, language.weight_paths),
    )


def _list_sources(files: PublishedFiles, published: Published) -> list[tuple[str, Path]]:
    """Every file that the result depends on, with the part that it plays."""
    language = published.language_folder
    listed = [
        ("language", path)
        for path in (
            files.language_dir / "config.json", language.tokenizer_path, *language.weight_paths,
        )
    ]  # fmt: skip
    listed.append(("vision", files.vision))
    if files.qformer is not None:
        listed.append(("qformer", files.qformer))
    if files.bert_dir is not None:
        listed.append(("bert", files.bert_dir / "config.json"))
    return [*listed, ("projection", files.projection)]


def _refuse_sources_inside(out_dir: Path, paths: list[tuple[str, Path]]) -> None:
    """What stands in the old folder goes when the new one takes its place."""
    inside = [path for _, path in paths if out_dir.resolve() in path.resolve().parents]
    if inside:
        raise CheckpointError(
            f"{inside[0]} lies in {out_dir}, which --force would replace. Choose another --out."
        )


def _stream(plan: ConversionPlan) -> Iterator[NamedWeight]:
    """Every weight in the plan's order; one file is open at a time."""
    for file in plan.files:
        tensors = {} if file.path is None else open_tensors(file.path)
        for weight in file.weights:
            origin = f"{file.path}: {', '.join(weight.source_names)}"
            made = weight.make([tensors[name] for name in weight.source_names])
            yield NamedWeight(weight.name, origin, made)
            # Both names must let go: the mapping of a file ends with its last tensor.
            del made
        del tensors


def _verify(
    folder: Path,
    plan: ConversionPlan,
    published: Published,
    dtype: DTypeName | None,
    meter: _Meter,
) -> Verification:
    meter.enter("comparing")
    num_weights = verify_weights(folder, plan.forms, _stream(plan), on_bytes=meter.add)
    parts = (published.vision, published.language, published.qformer, published.projection)
    meter.enter("computing")
    rows, logits = verify_answers(
        folder,
        plan.config,
        [part for part in parts if part is not None],
        dtype=dtype,
        is_tied=published.language_folder.is_tied,
        on_bytes=meter.add,
    )
    return Verification(num_weights, rows, logits)
