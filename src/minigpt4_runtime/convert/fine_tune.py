"""A projection that the original's training has saved → an adapter's file.

Owns   the one part of such a checkpoint that an adapter takes.
Takes  the checkpoint and the model folder that it is to go with; gives a file's content.
Never  runs a pickle, and cannot know over which model a checkpoint was trained: only shapes tell.
"""

from pathlib import Path

from minigpt4_runtime.checkpoint.adapter import encode_adapter
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.graph_folder import vision_digest
from minigpt4_runtime.checkpoint.weights import list_some, show_shape
from minigpt4_runtime.convert.inventory import take_inventory
from minigpt4_runtime.convert.key_map import matches, projection_map
from minigpt4_runtime.convert.recipe import Reader
from minigpt4_runtime.errors import CheckpointError

_NAMES = ("llama_proj.weight", "llama_proj.bias")
_REMEDY = "Give it to `minigpt4 convert` as --projection, with the files that it was trained with."


def read_fine_tune(path: Path, model_dir: Path) -> bytes:
    """The projection of a checkpoint of the original, as an adapter of this model folder.

    Raises:
        CheckpointError: it cannot be read, holds more than a projection, or does not fit.
    """
    config, inventory = load_config(model_dir), take_inventory(path, [path])
    weight = inventory.shape(_NAMES[0], remedy=_REMEDY)
    bias = inventory.shape(_NAMES[1], remedy=_REMEDY)
    unused = projection_map(config).unused
    others = [
        name for name in inventory.recipes if name not in _NAMES and not matches(name, unused)
    ]
    if others:
        raise CheckpointError(
            f"{path} holds more than a projection: {list_some(others)}. {_REMEDY}"
        )
    size, width = config.language.hidden_size, config.projection_width
    if (weight, bias) != ((size, width), (size,)):
        raise CheckpointError(
            f"{path}: {_NAMES[0]} is {show_shape(weight)}, and that of {model_dir} is "
            f"{show_shape((size, width))}. Give the model that it was trained with."
        )
    reader = Reader()
    tensors = (reader.read(inventory.recipes[name]).float() for name in _NAMES)
    record = {"base": vision_digest(model_dir), "model": model_dir.name, "from": path.name}
    own_weight, own_bias = tensors
    return encode_adapter(own_weight, own_bias, record)
