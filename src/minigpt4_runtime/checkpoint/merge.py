"""A model folder and an adapter → a whole model folder, which needs no adapter.

Owns   the copy of all weights with the adapter's among them.
Takes  both paths; gives a folder that every command takes.
Never  rounds a weight: integers stay as they are stored.
"""

from collections.abc import Callable
from pathlib import Path

from minigpt4_runtime.checkpoint.adapter import lay_over
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
from minigpt4_runtime.errors import CheckpointError


def merge(
    model_dir: Path,
    adapter: Path,
    out_dir: Path,
    *,
    force: bool = False,
    on_bytes: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Write the folder; it appears whole, or not at all. `on_bytes` gets the bytes done, and all.

    Raises:
        CheckpointError: one of both is damaged, they do not belong together, `out_dir` exists and
            `force` is not given, or the disk is full.
    """
    for path, what in ((model_dir, "model"), (adapter, "adapter")):
        if path.resolve().is_relative_to(out_dir.resolve()):
            raise CheckpointError(f"{out_dir} holds the {what} itself. Choose another --out.")
    config, manifest = load_config(model_dir), read_manifest(model_dir)
    stored, formats = lay_over(
        adapter, model_dir, read_folder_weights(model_dir), manifest.weight_format
    )
    parts = list_parts(blank_model(config, formats=formats))
    found = {name: place.shape for name, place in stored.items()}
    wanted = {name: part.shape for name, part in parts.items()}
    check_shapes(model_dir, wanted, found, remedy="Convert the model again.")
    names_of = {code: name for name, code in DTYPE_CODES.items()}
    forms = {
        name: WeightForm(stored[name].shape, names_of[stored[name].dtype_code]) for name in parts
    }
    tensors, num_bytes, num_written = FolderTensors(stored), total_bytes(forms), 0

    def count(more: int) -> None:
        nonlocal num_written
        num_written += more
        on_bytes(num_written, num_bytes)

    with staged_folder(out_dir, needed_bytes=num_bytes, force=force) as folder:
        weights = (NamedWeight(name, name, tensors[name]) for name in forms)
        write_weights(folder, forms, weights, on_bytes=count)
        sources = (*manifest.sources, SourceRecord.of("projection", adapter))
        stamped = Manifest.stamp(forms.values(), sources, formats)
        write_descriptions(folder, config, stamped, model_dir / TOKENIZER_NAME)
