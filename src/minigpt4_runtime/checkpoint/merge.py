"""A model folder and an adapter → a whole model folder, which needs no adapter.

Owns   the copy of all weights with the adapter's among them, and the sum of a weight and its LoRA.
Takes  both paths; gives a folder that every command takes.
Never  rounds integers anew: LoRA of a weight of integers stays beside it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.adapters import AdapterParts, adapted, lay_adapter_over
from minigpt4_runtime.checkpoint.blank_model import blank_model, list_parts
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.folder import TOKENIZER_NAME, staged_folder, write_descriptions
from minigpt4_runtime.checkpoint.manifest import Manifest, SourceRecord, read_manifest
from minigpt4_runtime.checkpoint.mapped import FolderTensors
from minigpt4_runtime.checkpoint.weights import (
    DTYPE_CODES,
    WeightForm,
    check_shapes,
    read_folder_weights,
)
from minigpt4_runtime.checkpoint.writer import NamedWeight, total_bytes, write_weights
from minigpt4_runtime.config import AdapterConfig, ModelConfig
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.formats.registry import FormatChoice, format_of


def merge(
    model_dir: Path,
    adapter: Path,
    out_dir: Path,
    *,
    made_of: Path | None = None,
    force: bool = False,
    on_bytes: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Write the folder; it appears whole, or not at all. `on_bytes` gets the bytes done, and all.

    The manifest names the adapter's files, or the one that these were `made_of`.

    Raises:
        CheckpointError: one of both is damaged, they do not belong together, `out_dir` exists and
            `force` is not given, or the disk is full.
    """
    for path, what in ((model_dir, "model"), (adapter, "adapter")):
        if path.resolve().is_relative_to(out_dir.resolve()):
            raise CheckpointError(f"{out_dir} holds the {what} itself. Choose another --out.")
    before, manifest = load_config(model_dir), read_manifest(model_dir)
    config = adapted(before, adapter, model_dir)
    stored, formats = lay_adapter_over(
        adapter, model_dir, config, read_folder_weights(model_dir), manifest.weight_format
    )
    tensors: Mapping[str, Tensor] = FolderTensors(stored)
    if before.language.adapters is None and config.language.adapters is not None:
        config, sums = _merged(config, formats, tensors)
        stored = {name: at for name, at in stored.items() if name not in sums.factors}
        tensors = sums
    parts = list_parts(blank_model(config, formats=formats))
    found = {name: place.shape for name, place in stored.items()}
    wanted = {name: part.shape for name, part in parts.items()}
    check_shapes(model_dir, wanted, found, remedy="Convert the model again.")
    names_of = {code: name for name, code in DTYPE_CODES.items()}
    forms = {
        name: WeightForm(stored[name].shape, names_of[stored[name].dtype_code]) for name in parts
    }
    num_bytes, num_written = total_bytes(forms), 0

    def count(more: int) -> None:
        nonlocal num_written
        num_written += more
        on_bytes(num_written, num_bytes)

    with staged_folder(out_dir, needed_bytes=num_bytes, force=force) as folder:
        weights = (NamedWeight(name, name, tensors[name]) for name in forms)
        write_weights(folder, forms, weights, on_bytes=count)
        files = {"adapter": made_of} if made_of else AdapterParts.find(adapter).files
        added = (SourceRecord.of(role, path) for role, path in files.items())
        sources = (*manifest.sources, *added)
        stamped = Manifest.stamp(forms.values(), sources, formats)
        write_descriptions(folder, config, stamped, model_dir / TOKENIZER_NAME)


class _Sums(Mapping[str, Tensor]):
    """The tensors of a folder, those of `owners` with their LoRA added: W + B·A·alpha/rank.

    The sum is in float32: the writer rounds it once, to the dtype that W is stored in, or refuses.
    """

    def __init__(self, tensors: Mapping[str, Tensor], owners: Mapping[str, float]) -> None:
        self._tensors = tensors
        self._owners = {f"{name}.weight": (name, scale) for name, scale in owners.items()}
        self.factors = {f"{name}.adapter.{side}" for name in owners for side in ("low", "high")}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if name not in self._owners:
            return tensor
        owner, scale = self._owners[name]
        low, high = (self._tensors[f"{owner}.adapter.{side}"].float() for side in ("low", "high"))
        return torch.addmm(tensor.float(), high, low, alpha=scale)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._tensors if name not in self.factors)

    def __len__(self) -> int:
        return len(self._tensors) - len(self.factors)


def _merged(
    config: ModelConfig, formats: FormatChoice, tensors: Mapping[str, Tensor]
) -> tuple[ModelConfig, _Sums]:
    """The config without the LoRA of weights that are floats, and these weights with it."""
    adapters = config.language.adapters
    assert adapters is not None, "there is LoRA to merge"
    scales = {
        f"language.{name}": adapters.alpha / rank
        for name, rank in adapters.ranks
        if format_of(formats, f"language.{name}") is DENSE
    }
    left = tuple(each for each in adapters.ranks if f"language.{each[0]}" not in scales)
    kept = AdapterConfig(adapters.alpha, left) if left else None
    language = replace(config.language, adapters=kept)
    return replace(config, language=language), _Sums(tensors, scales)
