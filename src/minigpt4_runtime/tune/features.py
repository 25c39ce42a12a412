"""What the frozen image side makes of each picture, computed once and kept on the disk.

Owns   the file features-KEY.safetensors, whose key has the pictures and the image side in it.
Takes  the pictures of TuningData; gives rows before the projection, or before the Q-Former where
       that learns too, in float32.
Never  keeps a file that is not whole.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.load import load_vision
from minigpt4_runtime.checkpoint.mapped import map_tensors
from minigpt4_runtime.checkpoint.weights import WeightForm, read_header
from minigpt4_runtime.checkpoint.writer import encode_header, sync
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.images.pixels import load as load_image
from minigpt4_runtime.new_folder import new_folder
from minigpt4_runtime.report.files import writing
from minigpt4_runtime.tune.data import TuningData

PICTURES_AT_ONCE = 8
_NAME = "features"


def picture_features(
    data: TuningData,
    model_dir: Path,
    base: str,
    out_dir: Path,
    *,
    device: torch.device,
    before_qformer: bool = False,
    on_picture: Callable[[], None] = lambda: None,
) -> Tensor:
    """The features (N, R, W) of all pictures, in a mapped file. `base`: the image side's digest.

    `before_qformer` keeps the rows (N, P, C) of the tower, behind its last norm.
    The image side is loaded, in float32, only if the file is not there yet. `on_picture` is
    called for each picture that is done.

    Raises:
        ConfigError: the file cannot be written; the disk is full, for example.
        ImageError: a picture that was there is gone.
    """
    named = (base, *data.picture_digests, *(("tower",) if before_qformer else ()))
    key = hashlib.sha256(" ".join(named).encode()).hexdigest()[:16]
    path = out_dir / f"features-{key}.safetensors"
    if not _is_whole(path):
        temporary = path.with_name(f".{path.name}.tmp")
        with writing(path), new_folder(out_dir):
            try:
                with temporary.open("wb") as file:
                    _write(
                        file, data, model_dir,
                        device=device, before_qformer=before_qformer, on_picture=on_picture,
                    )  # fmt: skip
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    return map_tensors(read_header(path))[_NAME]


def _is_whole(path: Path) -> bool:
    """Else it is made again: a copy of the folder may have been cut off."""
    try:
        return path.is_file() and bool(read_header(path))
    except CheckpointError:
        return False


@torch.inference_mode()
def _write(
    file: BinaryIO,
    data: TuningData,
    model_dir: Path,
    *,
    device: torch.device,
    before_qformer: bool,
    on_picture: Callable[[], None],
) -> None:
    config = load_config(model_dir)
    vision = load_vision(model_dir, dtype=torch.float32).to(device)
    encode = vision.tower if before_qformer else vision.features
    size = (config.rows_per_image, config.projection_width)
    if before_qformer:
        size = (1 + config.vision.num_patches, config.vision.hidden_size)
    file.write(encode_header({_NAME: WeightForm((len(data.pictures), *size), "float32")}))
    for first in range(0, len(data.pictures), PICTURES_AT_ONCE):
        some = data.pictures[first : first + PICTURES_AT_ONCE]
        values = [torch.from_numpy(load_image(each, config.vision).values) for each in some]
        features = encode(torch.stack(values).to(device)).cpu().contiguous()
        file.write(features.numpy().data)
        for _ in some:
            on_picture()
    sync(file)
