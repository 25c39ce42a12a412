"""The check that the written model is the published one, before the folder gets its name.

Owns   the comparison of every weight, of one image's rows and of one prompt's logits.
Takes  the folder as written and the published files; gives a Verification, or an error.
Never  trusts the key map: `original` computes the published side under published names.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from minigpt4_runtime.checkpoint.blank_model import blank_model
from minigpt4_runtime.checkpoint.load import read_tensor
from minigpt4_runtime.checkpoint.weights import StoredTensor, WeightForm, read_folder_weights
from minigpt4_runtime.checkpoint.writer import NamedWeight, rounded_chunks
from minigpt4_runtime.config import DTypeName, ModelConfig
from minigpt4_runtime.convert import original
from minigpt4_runtime.convert.inventory import Inventory
from minigpt4_runtime.convert.original import Originals
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.model.causal import causal_attention
from minigpt4_runtime.text.tokenizer import Tokenizer

# Both sides compute in float32 on equally rounded weights: only the order of sums differs.
LARGEST_DIFFERENCE = 1e-3
_PROMPT = "Describe this image in detail."
_LONGEST_PROMPT = 8
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Verification:
    """The result. Differences are parts of the largest value on the original's side."""

    num_weights: int
    rows_difference: float
    logits_difference: float


def verify_weights(
    folder: Path,
    forms: Mapping[str, WeightForm],
    weights: Iterable[NamedWeight],
    *,
    on_bytes: Callable[[int], None],
) -> None:
    """Compare every weight on the disk with its published tensors.

    Raises:
        CheckpointError: one of them differs.
    """
    stored = read_folder_weights(folder)
    for weight in weights:
        place = stored[weight.name]
        with place.path.open("rb") as file:
            file.seek(place.start)
            for chunk in rounded_chunks(weight, forms[weight.name].dtype):
                wanted = chunk.view(torch.uint8)
                found = bytearray(wanted.numel())
                file.readinto(found)
                if not torch.equal(torch.frombuffer(found, dtype=torch.uint8), wanted):
                    raise CheckpointError(
                        f"{weight.name} on the disk differs from {weight.origin}. Convert again; "
                        "if it happens again, check the disk and the memory of this machine."
                    )
                on_bytes(len(found))


@torch.no_grad()
def verify_answers(
    folder: Path,
    config: ModelConfig,
    inventories: Iterable[Inventory],
    *,
    dtype: DTypeName | None,
    on_bytes: Callable[[int], None],
) -> tuple[float, float]:
    """Compute one image and one prompt on both sides; gives the differences of rows and logits.

    All weights were rounded to `dtype`; None if each kept its own.

    Raises:
        CheckpointError: a difference is above LARGEST_DIFFERENCE.
    """
    tokenizer = Tokenizer(folder / "tokenizer.model")
    token_ids = [tokenizer.bos_id, *tokenizer.encode(_PROMPT)[:_LONGEST_PROMPT]]
    pixels = _synthetic_pixels(config.vision.image_size)
    rounded_to = None if dtype is None else getattr(torch, dtype)
    originals = Originals(inventories, rounded_to, on_bytes)
    wanted_rows = original.image_rows(originals, config, pixels)
    embeddings = torch.cat([wanted_rows, original.embed(originals, token_ids)])
    wanted = original.logits(originals, config.language, embeddings)
    del originals
    model = blank_model(config)
    _bring_weights_when_called(model, read_folder_weights(folder), on_bytes)
    rows = model.vision(pixels)[0]
    embeddings = torch.cat([rows, model.language.embed(torch.tensor(token_ids))])
    hidden = model.language(embeddings, torch.arange(len(embeddings)), causal_attention())
    logits = model.language.logits(hidden)
    return _compare("image rows", rows, wanted_rows), _compare("logits", logits, wanted)


def _synthetic_pixels(size: int) -> Tensor:
    """(1, 3, size, size): a slope of colour under fixed noise, as wide as normalised pixels."""
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return noise + torch.linspace(-1.5, 1.5, size)


def _bring_weights_when_called(
    model: nn.Module, stored: Mapping[str, StoredTensor], on_bytes: Callable[[int], None]
) -> None:
    """Keep no more than one module's own weights in memory, in float32."""
    for prefix, module in model.named_modules():
        own = {
            name: stored[f"{prefix}.{name}"] for name, _ in module.named_parameters(recurse=False)
        }
        if own:
            module.register_forward_pre_hook(partial(_bring, own, on_bytes))
            module.register_forward_hook(partial(_drop, own))


def _bring(
    own: Mapping[str, StoredTensor],
    on_bytes: Callable[[int], None],
    module: nn.Module,
    _inputs: object,
) -> None:
    for name, place in own.items():
        weight = read_tensor(place, device=_CPU, dtype=torch.float32)
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
        on_bytes(place.num_bytes)


def _drop(
    own: Mapping[str, StoredTensor], module: nn.Module, _inputs: object, _outputs: object
) -> None:
    for name, place in own.items():
        setattr(module, name, nn.Parameter(torch.empty(place.shape, device="meta")))


def _compare(what: str, found: Tensor, wanted: Tensor) -> float:
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    # A NaN is above every bound.
    if not difference <= LARGEST_DIFFERENCE:
        raise CheckpointError(
            f"The converted model's {what} differ from the original's by {difference:.1e} of the "
            f"largest value; {LARGEST_DIFFERENCE:.0e} is allowed. Please report this: the "
            "conversion does not fit these files."
        )
    return difference
