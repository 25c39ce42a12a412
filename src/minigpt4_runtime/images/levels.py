"""Levels of any depth → an RGB image of 8 bits.

Owns   the conversion of 16-bit and float images to 8 bits, and the shapes of images in arrays.
Takes  a Pillow image of any mode, a numpy array or a torch tensor; gives a Pillow image.
Never  guesses a range: 16 bits go from 0 to 65,535 and floats from 0 to 1, or are refused.
"""

import sys
from typing import Any

import numpy
from PIL.Image import Image, fromarray

from minigpt4_runtime.errors import ImageError

Array = numpy.ndarray[Any, numpy.dtype[Any]]

# Pillow's modes of more than 8 bits. Its `convert("RGB")` turns their levels above 255 white.
_DEEP_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N", "F"})
_CHANNELS = frozenset({1, 3, 4})
_LEVELS_AT_ONCE = 2**20


def to_rgb(image: Image, name: str, *, top: int = 65_535) -> Image:
    """Like Pillow's `convert("RGB")`, but with deep levels scaled. `top` is white.

    Raises:
        ImageError: a level is beyond the range; `name` is for the message.
    """
    if image.mode in _DEEP_MODES:
        image = fromarray(_to_8_bits(numpy.asarray(image), name, top))
    elif "transparency" in image.info:
        # Converting to RGB ignores it, but for a warning about some palettes.
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def as_array(value: object, name: str) -> Array | None:
    """A numpy array or a torch tensor as an array of (H, W) or (H, W, C); None if it is neither.

    Raises:
        ImageError: it has another shape, or one in which channels cannot be told from rows.
    """
    if isinstance(value, numpy.ndarray):
        return _with_channels_last(value, name, is_tensor=False)
    # While torch is not loaded there can be no tensor, and loading it takes seconds.
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return None
    try:
        tensor = value.detach().cpu()
        # numpy does not know all of torch's kinds of floats.
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except (TypeError, RuntimeError) as error:  # Sparse, quantised, without values.
        raise ImageError(f"{name} cannot become an array ({error}). Give a dense one.") from None
    return _with_channels_last(array, name, is_tensor=True)


def from_array(array: Array, name: str) -> Image:
    """The image in an array of (H, W) or (H, W, C).

    Raises:
        ImageError: its levels are of another kind, or beyond their range.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != numpy.uint8:
        array = _to_8_bits(array, name, 65_535)
    return fromarray(numpy.ascontiguousarray(array))


def _with_channels_last(array: Array, name: str, *, is_tensor: bool) -> Array:
    is_known = array.dtype.kind == "f" or array.dtype.str[1:] in {"u1", "u2"}  # In any byte order.
    last = array.ndim == 3 and array.shape[2] in _CHANNELS
    first = array.ndim == 3 and array.shape[0] in _CHANNELS
    if not is_known or not (array.ndim == 2 or last or first):
        raise ImageError(
            f"{name} is {array.dtype} of shape {array.shape}. Give uint8, uint16 or floats from 0 "
            "to 1, of shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels."
        )
    # Arrays have their channels last by custom; tensors come either way.
    if last and first and is_tensor:
        raise ImageError(
            f"{name} has the shape {array.shape}, of which either end could be the channels. "
            "Give it as a numpy array of shape (H, W, C)."
        )
    return array if last or array.ndim == 2 else array.transpose(1, 2, 0)


def _to_8_bits(levels: Array, name: str, top: int) -> Array:
    is_float = levels.dtype.kind == "f"
    white = 1 if is_float else top
    lowest, highest = levels.min(), levels.max()
    if not (lowest >= 0 and highest <= white):  # Not a number is neither.
        kind = "floats from 0 to 1" if is_float else f"16-bit levels from 0 to {top:,}"
        raise ImageError(
            f"{name} has levels from {lowest:g} to {highest:g}; {kind} are read here. Scale it."
        )
    scaled = numpy.empty(levels.shape, dtype=numpy.uint8)
    num_rows = max(1, _LEVELS_AT_ONCE // max(1, levels[0].size))  # All at once is gigabytes.
    for first in range(0, len(levels), num_rows):
        rows = levels[first : first + num_rows].astype(numpy.float32)
        scaled[first : first + num_rows] = numpy.rint(rows * (255 / white))
    return scaled
