"""A model folder of floats → a model folder in other weight formats, one weight at a time.

Owns   the reading of each weight when its turn comes, and what is refused before.
Takes  a model folder, a FormatChoice and the path of the new folder; gives a Quantised.
Never  holds more than one weight of floats.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from minigpt4_runtime.checkpoint.blank_model import ModelWeight
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.folder import TOKENIZER_NAME, check_target, write_folder
from minigpt4_runtime.checkpoint.manifest import read_manifest
from minigpt4_runtime.checkpoint.mapped import FolderTensors
from minigpt4_runtime.checkpoint.weights import read_folder_weights
from minigpt4_runtime.errors import CheckpointError, ConfigError
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.formats.float8 import FLOAT8
from minigpt4_runtime.formats.registry import FormatChoice, show_formats
from minigpt4_runtime.quantise.calibrate import LayerWalk
from minigpt4_runtime.quantise.choice import DEFAULT_METHOD, Method, QuantisePlan, choose
from minigpt4_runtime.quantise.samples import encode_samples, read_samples

# Gets the stage, the bytes that are written so far, and their total.
Progress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class Quantised:
    """The result: the formats, and the sizes of all weights before and after."""

    formats: FormatChoice
    bytes_before: int
    bytes_after: int


def quantise(
    model_dir: Path,
    out_dir: Path,
    plan: QuantisePlan,
    *,
    calibrate: Path | None = None,
    method: Method | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Quantised:
    """Make a model folder whose weights are held as the plan says. It appears whole, or not at all.

    `calibrate` are pictures for which the layers' errors shall be small: see `read_samples`, and
    `LayerWalk` for the method.

    Raises:
        CheckpointError: the model is damaged or quantised already, or the folder cannot be written.
        ConfigError: the plan cannot be, or not for this model.
    """
    config, manifest = load_config(model_dir), read_manifest(model_dir)
    if manifest.weight_format != DENSE.name:
        raise CheckpointError(
            f"{model_dir} is quantised already ({show_formats(manifest.weight_format)}). Quantise "
            "the model of floats that it was made from."
        )
    if out_dir.resolve() == model_dir.resolve():
        raise CheckpointError(f"{out_dir} is the model itself. Choose another --out.")
    formats = choose(plan, config)
    check_target(out_dir, force=force)
    if calibrate is None and method is not None:
        raise ConfigError(f"--method is {method}, and there is nothing to read: give --calibrate.")
    if calibrate is not None and config.language.adapters is not None:
        raise ConfigError(
            f"{model_dir} keeps LoRA adapters beside its weights, and --calibrate would not see "
            "what they add. Leave --calibrate out, or convert without --keep-lora."
        )
    if calibrate is not None and plan.weights == FLOAT8.name:
        raise ConfigError(
            f"{FLOAT8.name} is rounded number by number, and --calibrate has no method for it. "
            "Leave --calibrate out, or take w8a8."
        )
    samples = None if calibrate is None else read_samples(calibrate)
    stored = read_folder_weights(model_dir)
    bytes_after = 0

    def count(num_bytes: int, total_bytes: int) -> None:
        nonlocal bytes_after
        bytes_after = total_bytes
        if progress is not None:
            progress("rounding", num_bytes, total_bytes)

    floats = FolderTensors(stored)
    pack: Callable[[ModelWeight, Tensor], dict[str, Tensor]] = ModelWeight.pack
    if samples is not None:
        rows = encode_samples(samples, model_dir, config, floats["language.token_embedding.weight"])
        pack = LayerWalk(config.language, formats, floats, rows, method or DEFAULT_METHOD).pack
    write_folder(
        out_dir, config, floats, model_dir / TOKENIZER_NAME,
        formats=formats, sources=manifest.sources, force=force, pack=pack, on_bytes=count,
    )  # fmt: skip
    return Quantised(formats, sum(place.num_bytes for place in stored.values()), bytes_after)
