"""A tuned projection → a checkpoint as the original's training saves one.

Owns   its form: a pickle of torch's, {"model": {"llama_proj.weight": …, "llama_proj.bias": …}}.
Takes  an adapter and its model folder; gives a file, which appears whole.
Never  puts more than tensors and names into it, so that torch.load needs no trust to read it.
"""

from pathlib import Path

import torch

from minigpt4_runtime.checkpoint.adapter import NAMES, check_base, read_adapter
from minigpt4_runtime.checkpoint.adapters import AdapterParts
from minigpt4_runtime.checkpoint.mapped import map_tensors
from minigpt4_runtime.errors import CheckpointError


def export_original(adapter: Path, model_dir: Path, out: Path) -> None:
    """Write the projection in float32, for the original's `ckpt`.

    Raises:
        CheckpointError: the adapter is another model's or holds more than a projection, or the file
            cannot be written.
    """
    parts = AdapterParts.find(adapter)
    if parts.lora is not None or parts.projection is None:
        raise CheckpointError(
            f"{adapter} holds LoRA, and the original's checkpoint of a projection does not. Name "
            "its projection.safetensors alone, or merge the adapter into a model folder."
        )
    stored, record = read_adapter(parts.projection)
    check_base(parts.projection, record, model_dir)
    if set(stored) != set(NAMES):
        raise CheckpointError(
            f"{adapter} holds more than a projection, and the original's checkpoint of one does "
            "not. Merge the adapter into a model folder."
        )
    tensors = map_tensors(stored)
    named = {f"llama_proj.{name.rpartition('.')[2]}": tensors[name].clone() for name in NAMES}
    partial = out.with_name(f".{out.name}.partial")
    try:
        torch.save({"model": named}, partial)
        partial.replace(out)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{out} cannot be written: {reason}. Choose another place.") from None
