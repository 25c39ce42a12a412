"""An adapter → a checkpoint as the original's training saves one.

Owns   its form: a pickle of torch's, {"model": {name: tensor}, "config": {"model": {…}}}, in which
       all that was trained has upstream's names.
Takes  an adapter and its model folder; gives a file, which appears whole.
Never  puts more than tensors, names and numbers into it: torch.load needs no trust to read it.
"""

from pathlib import Path

import torch
from torch import Tensor

from minigpt4_runtime.checkpoint.adapter import RECORD, dumped, find_record, read_adapter
from minigpt4_runtime.checkpoint.adapters import AdapterParts, adapted, lay_adapter_over
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.graph_folder import vision_digest
from minigpt4_runtime.checkpoint.mapped import map_tensors
from minigpt4_runtime.config import AdapterConfig, ModelConfig
from minigpt4_runtime.convert.key_map import LANGUAGE_PREFIX, trained_origins
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.formats.dense import DENSE

# Upstream's minigpt_v2.py alone has LoRA, on these matrices (upstream: minigpt_base.py).
_LORA_TEMPLATE, _LORA_TARGETS = "minigptv2", {"attention.query", "attention.value"}


def check_place(out: Path, *, force: bool) -> None:
    """Refuse a place before any work is done: a file that is there may be what is read.

    Raises:
        CheckpointError: there is a folder, or a file and no `force`.
    """
    if out.is_dir():
        raise CheckpointError(f"{out} is a folder. Name a file.")
    if out.exists() and not force:
        raise CheckpointError(f"{out} is there already. Name another file, or give --force.")


def export_original(adapter: Path, model_dir: Path, out: Path) -> list[str]:
    """Write what was trained in float32, for upstream's `ckpt`; gives what else upstream needs.

    Raises:
        CheckpointError: the adapter is another model's, or the file cannot be written.
    """
    config = adapted(load_config(model_dir), adapter, model_dir)
    stored, _ = lay_adapter_over(adapter, model_dir, config, {}, DENSE.name)
    tensors = map_tensors(stored)
    named: dict[str, Tensor] = {}
    for name, origin in trained_origins(config).items():
        if name in tensors:
            prefix = LANGUAGE_PREFIX if ".adapter." in name else ""
            # Upstream's query tokens are a batch of one, which our own lack.
            tensor = tensors[name][None] if name.endswith("query_tokens") else tensors[name]
            named[f"{prefix}{origin.names[0]}"] = tensor.float().clone()
    settings: dict[str, object] = {
        "image_size": config.vision.image_size, RECORD: dumped(_record(adapter, model_dir)),
    }  # fmt: skip
    lora = config.language.adapters if any(".adapter." in name for name in tensors) else None
    if lora is not None:
        ranks = {rank for _, rank in lora.ranks}
        if len(ranks) > 1:
            raise CheckpointError(
                f"{adapter} holds LoRA of the ranks {sorted(ranks)}, and the original has one for "
                "all. Merge it into a model folder with --out."
            )
        settings |= {"lora_r": ranks.pop(), "lora_alpha": lora.alpha}
    _save({"model": named, "config": {"model": settings}}, out)
    return _needs(config, lora) if lora else []


def _record(adapter: Path, model_dir: Path) -> dict[str, object]:
    """How the adapter was made; of PEFT's own, the model that it is used with is all."""
    parts = AdapterParts.find(adapter)
    if parts.projection is not None:
        return read_adapter(parts.projection)[1]
    lora = parts.read_lora(load_config(model_dir), model_dir)
    made = find_record(lora.metadata) if lora else None
    return made or {"base": vision_digest(model_dir), "model": model_dir.name}


def _needs(config: ModelConfig, lora: AdapterConfig) -> list[str]:
    (rank,) = {rank for _, rank in lora.ranks}
    needs = [
        f"The original needs lora_r: {rank} and lora_alpha: {lora.alpha:g} in its configuration, "
        "and as llama_model what `minigpt4 export language` makes of this model."
    ]
    targets = {name.split(".", 2)[2] for name, _ in lora.ranks}
    if config.template != _LORA_TEMPLATE or targets - _LORA_TARGETS:
        needs.append(
            "But its own code has LoRA in minigpt_v2 alone, on q_proj and v_proj alone, and passes "
            "over other names in silence: change it, or give it a language model that has the LoRA "
            "merged, by --out and `minigpt4 export language`."
        )
    return needs


def _save(content: dict[str, object], out: Path) -> None:
    partial = out.with_name(f".{out.name}.partial")
    try:
        torch.save(content, partial)
        partial.replace(out)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{out} cannot be written: {reason}. Choose another place.") from None
