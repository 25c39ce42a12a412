"""What the original's training has saved → an adapter of a model folder.

Owns   the parts of such a checkpoint that an adapter takes: projection, Q-Former and LoRA.
Takes  the checkpoint and the model folder that it is to go with; gives an adapter's files.
Never  runs a pickle, and cannot know over which model a checkpoint was trained: shapes tell, and
       the record that `merge --export-original` writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.adapter import (
    NAMES,
    PROJECTION,
    QFORMER,
    check_base,
    described,
    encode_adapter,
    find_record,
)
from minigpt4_runtime.checkpoint.adapters import PROJECTION_NAME, REPLACES
from minigpt4_runtime.checkpoint.blank_model import model_shapes
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.graph_folder import vision_digest
from minigpt4_runtime.checkpoint.lora import check_factors, encode_lora, factor_name
from minigpt4_runtime.checkpoint.mapped import DTYPE_NAME_OF, FLOATS_WANTED
from minigpt4_runtime.checkpoint.weights import TensorShape, list_some, show_shape
from minigpt4_runtime.config import AdapterConfig, ModelConfig
from minigpt4_runtime.convert.adapters import DEFAULT_ALPHA
from minigpt4_runtime.convert.inventory import Inventory, take_inventory
from minigpt4_runtime.convert.key_map import (
    OriginMap,
    matches,
    projection_map,
    trained_origins,
)
from minigpt4_runtime.convert.layouts import LAYOUTS
from minigpt4_runtime.convert.published import read_settings
from minigpt4_runtime.convert.recipe import Make, Reader, Recipe
from minigpt4_runtime.convert.training import read_training
from minigpt4_runtime.errors import CheckpointError, ConfigError

_SUFFIXES = (".pth", ".pt", ".bin")
_REMEDY = "Give it to `minigpt4 convert` as --projection, with the files that it was trained with."


@contextmanager
def own_adapter(path: Path, model_dir: Path) -> Iterator[Path]:
    """An adapter's path; of a checkpoint of the original a folder, which is there for this while.

    What is raised in that while of the folder names the checkpoint.

    Raises:
        CheckpointError: see `read_fine_tune`.
    """
    if path.suffix not in _SUFFIXES or path.is_dir():
        yield path
        return
    files = read_fine_tune(path, model_dir)
    # What is mapped into memory cannot be removed on Windows, and stays there.
    with TemporaryDirectory(prefix="minigpt4-adapter-", ignore_cleanup_errors=True) as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            yield Path(folder)
        except (CheckpointError, ConfigError) as error:
            # Who gave a checkpoint knows nothing of this folder, which is gone by then.
            said = str(error)
            for each in (*(Path(folder) / name for name in files), folder):
                said = said.replace(str(each), str(path))
            raise type(error)(said) from error


def read_fine_tune(path: Path, model_dir: Path) -> dict[str, bytes]:
    """The files of an adapter of this model folder, by their names: projection, LoRA, or both.

    Raises:
        CheckpointError: it cannot be read, holds what no adapter has, or does not fit.
    """
    config, inventory = load_config(model_dir), take_inventory(path, [path])
    training, made = read_training(path), find_record(read_settings(path))
    if made is not None:
        check_base(path, made, model_dir)
    _check_arch(path, training.arch, config, model_dir)
    record: dict[str, object] = {
        "base": vision_digest(model_dir),
        "model": model_dir.name,
        "from": path.name,
    }
    lora = _find_lora(inventory, config, training.lora_alpha or DEFAULT_ALPHA)
    if lora is not None and made is None:
        record[REPLACES] = _replaces_lora(path, config, model_dir)
    config = replace(config, language=replace(config.language, adapters=lora))
    tensors = _read_tensors(inventory, config, model_dir)
    record |= made or {}
    files = {}
    if NAMES[0] in tensors:
        qformer = {name: each for name, each in tensors.items() if name.startswith(f"{QFORMER}.")}
        weight, bias = (tensors[name] for name in NAMES)
        files[PROJECTION_NAME] = encode_adapter(weight, bias, record, qformer)
    if lora is not None:
        factors = {name: each for name, each in tensors.items() if ".adapter." in name}
        files |= encode_lora(factors, lora.alpha, described(record), model_dir.name)
    return files


def _check_arch(path: Path, arch: str | None, config: ModelConfig, model_dir: Path) -> None:
    own = {layout.template: layout.arch for layout in LAYOUTS}.get(config.template, arch)
    if arch is not None and arch != own:
        raise CheckpointError(
            f"{path} was trained as {arch}, and {model_dir} is of {own}. Give the model that it "
            "was trained with."
        )


def _find_lora(inventory: Inventory, config: ModelConfig, alpha: float) -> AdapterConfig | None:
    shapes = {
        own: recipe.shape
        for name, recipe in inventory.recipes.items()
        if (own := factor_name(f"base_model.model.{name}"))
    }
    if not shapes:
        return None
    return AdapterConfig(alpha, check_factors(inventory.path, shapes, config.language))


def _replaces_lora(path: Path, config: ModelConfig, model_dir: Path) -> bool:
    """Whether it takes the place of the LoRA that upstream has trained on.

    Raises:
        CheckpointError: that is merged into the weights, and would count twice.
    """
    is_kept = config.language.adapters is not None
    has_lora = any(each.has_adapters and each.template == config.template for each in LAYOUTS)
    if has_lora and not is_kept:
        raise CheckpointError(
            f"{path} holds LoRA of the language model as it was published, and {model_dir} has "
            "other LoRA merged into that. Take the folder that `minigpt4 convert --keep-lora` "
            "makes of the published files, or give this file to `minigpt4 convert` as --projection."
        )
    return is_kept


def _read_tensors(inventory: Inventory, config: ModelConfig, model_dir: Path) -> dict[str, Tensor]:
    """What was trained, in float32 by our names."""
    origins, found = trained_origins(config), inventory.recipes
    _check_names(inventory, origins, config)
    shapes, reader, tensors = model_shapes(config), Reader(), {}
    for name, origin in origins.items():
        if (recipe := found.get(origin.names[0])) is not None:
            _check_fit(recipe, origin.make, shapes[name], model_dir)
            tensors[name] = origin.make([reader.read(recipe)]).float()
            if not bool(torch.isfinite(tensors[name]).all()):
                raise CheckpointError(
                    f"{recipe.origin} holds NaN or an infinite value, so the training had failed "
                    "when it was saved. Take an earlier checkpoint."
                )
    return tensors


def _check_names(inventory: Inventory, origins: OriginMap, config: ModelConfig) -> None:
    """Each part is whole or absent, and nothing else is there."""
    theirs = {name: origin.names[0] for name, origin in origins.items()}
    held = {name for name, published in theirs.items() if published in inventory.recipes}
    unused = projection_map(config).unused
    others = [
        name for name in inventory.recipes
        if name not in theirs.values() and not matches(name, unused)
    ]  # fmt: skip
    if any(name.startswith("base_model.model.") for name in others):
        raise CheckpointError(
            f"{inventory.path} holds weights by PEFT's own names, and not the settings that belong "
            "to them. Give the folder that PEFT's save_pretrained wrote."
        )
    if others:
        raise CheckpointError(
            f"{inventory.path} holds more than an adapter of this model can: {list_some(others)}. "
            f"{_REMEDY}"
        )
    has_qformer = any(name.startswith(f"{QFORMER}.") for name in held)
    needed = [PROJECTION] if has_qformer or config.language.adapters is None else []
    needed += [QFORMER] if has_qformer else []
    for name in theirs:
        if name not in held and (
            name.startswith(tuple(f"{part}." for part in needed))
            or (name in NAMES and held & set(NAMES))
        ):
            inventory.shape(theirs[name], remedy=_REMEDY)


def _check_fit(recipe: Recipe, make: Make, wanted: TensorShape, model_dir: Path) -> None:
    if recipe.dtype not in DTYPE_NAME_OF:
        dtype = str(recipe.dtype).removeprefix("torch.")
        raise CheckpointError(f"{recipe.origin} is of dtype {dtype}. {FLOATS_WANTED}")
    try:
        made = Recipe.joined([recipe], make).shape
    except (RuntimeError, IndexError, ValueError):
        made = None
    if made != wanted:
        raise CheckpointError(
            f"{recipe.origin} is {show_shape(recipe.shape)}, and that of {model_dir} is "
            f"{show_shape(wanted)}. Give the model that it was trained with."
        )
