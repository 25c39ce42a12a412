"""Adapters of which each request may choose one: their parts beside a loaded model.

Owns   the LoRA factors that a rank's weights get beside them, and the image side that an adapter
       has of its own, which shares all but what was tuned.
Takes  the loaded sides and the adapters' paths, numbered from 1; gives bytes and modules.
Never  changes a weight of the model.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from minigpt4_runtime.checkpoint.adapter import check_base, read_adapter
from minigpt4_runtime.checkpoint.adapters import AdapterParts, replaces_lora
from minigpt4_runtime.checkpoint.blank_model import Where, blank_for
from minigpt4_runtime.checkpoint.load import read_tensor
from minigpt4_runtime.checkpoint.weights import StoredTensor, cut
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.model.adapter import AdapterChoice, Factors
from minigpt4_runtime.model.linear import Linear, settle
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.minigpt4 import VisionPart
from minigpt4_runtime.model.parallel import Group, share, split_dimension


def add_choices(
    language: Llama, config: ModelConfig, paths: Sequence[Path], model_dir: Path
) -> int:
    """Put the factors of these adapters beside the weights, this rank's part; gives their bytes.

    Raises:
        CheckpointError: one of them is damaged, or another model's, or not finite.
    """
    embedding = language.token_embedding.weight
    found: defaultdict[str, dict[int, Factors]] = defaultdict(dict)
    for number, path in enumerate(paths, 1):
        lora = AdapterParts.find(path).read_lora(config, model_dir)
        if lora is not None and replaces_lora(lora):
            raise CheckpointError(
                f"An adapter replaces the LoRA that {model_dir} keeps beside its weights, which no "
                "single request can choose. Give it alone, without a name."
            )
        for owner, rank in lora.config.ranks if lora else ():
            assert lora is not None, "it has ranks"
            names = [f"language.{owner}.adapter.{side}" for side in ("low", "high")]
            low, high = (
                read_tensor(
                    _part(name, lora.factors[name], language.group),
                    device=embedding.device, dtype=embedding.dtype,
                )
                for name in names
            )  # fmt: skip
            # Other requests' rows are multiplied by B as well, as 0. All of it is finite, as read,
            # for 0 · NaN is NaN.
            found[owner][number] = Factors(low, high, lora.config.alpha / rank)
    num_bytes = 0
    for owner, factors in found.items():
        linear = language.get_submodule(owner)
        assert isinstance(linear, Linear), "LoRA is of matrices"
        linear.choice = AdapterChoice(factors)
        num_bytes += linear.choice.num_bytes
    return num_bytes


def _part(name: str, place: StoredTensor, group: Group) -> StoredTensor:
    dimension = split_dimension(name)
    if group.size == 1 or dimension is None:
        return place
    return cut(place, dimension, share(place.shape[dimension], group))


def tuned_vision(
    part: VisionPart,
    config: ModelConfig,
    adapter: Path,
    model_dir: Path,
    **where: Unpack[Where],
) -> VisionPart | None:
    """The image side under an adapter; None where it has none of its own.

    Raises:
        CheckpointError: it is damaged, or another model's.
    """
    path = AdapterParts.find(adapter).projection
    if path is None:
        return None
    stored, record = read_adapter(path)
    check_base(path, record, model_dir)
    tensors = {
        name.removeprefix("vision."): read_tensor(
            place, device=where["device"], dtype=where["dtype"]
        )
        for name, place in stored.items()
    }
    own = {name.partition(".")[0] for name in tensors}
    tuned = blank_for(where, config, DENSE.name).vision
    for name, child in part.named_children():
        if name not in own:
            setattr(tuned, name, child)
            continue
        module = tuned.get_submodule(name)
        first = f"{name}."
        module.load_state_dict(
            {
                key.removeprefix(first): each
                for key, each in tensors.items()
                if key.startswith(first)
            },
            strict=True,
            assign=True,
        )
        settle(module)
    return tuned
