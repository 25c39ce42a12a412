"""A training that can go on: what learns, the optimiser's moments and the number of steps done.

Owns   the file state.safetensors, which is replaced as a whole.
Takes  a Learner, its AdamW, and the record of what the training is; gives them back as they were.
Never  holds a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minigpt4_runtime.checkpoint.adapter import dumped
from minigpt4_runtime.checkpoint.mapped import map_tensors
from minigpt4_runtime.checkpoint.weights import StoredTensor, read_described
from minigpt4_runtime.checkpoint.writer import encode_tensors
from minigpt4_runtime.errors import CheckpointError, ConfigError
from minigpt4_runtime.report.files import write_whole
from minigpt4_runtime.tune.learner import Learner

STATE_NAME = "state.safetensors"
_RECORD = "minigpt4_training"
# These settings may change on the way: they change the memory, and the order of sums.
_MEMORY_ALONE = {"at_once", "recompute", "divide"}
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_state(
    out_dir: Path,
    learner: Learner,
    optimiser: torch.optim.AdamW,
    step: int,
    record: Mapping[str, Any],
) -> None:
    """Write all of it, or leave what was there.

    Raises:
        ConfigError: the file cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in learner.learned.items():
        tensors[name] = parameter
        for moment in _MOMENTS:
            if parameter in optimiser.state:
                tensors[f"{name}.{moment}"] = optimiser.state[parameter][moment]
    metadata = {_RECORD: dumped({"step": step, "training": dict(record)})}
    write_whole(out_dir / STATE_NAME, encode_tensors(tensors, metadata))


def check_state(out_dir: Path, record: Mapping[str, Any]) -> None:
    """Refuse to go on where there is no state, or that of another training.

    Raises:
        ConfigError: the message names what differs.
    """
    path, (_, before) = out_dir / STATE_NAME, _read(out_dir)
    wanted = json.loads(dumped(record))
    differing = sorted(
        name
        for name in (wanted | before["training"]).keys() - _MEMORY_ALONE
        if wanted.get(name) != before["training"].get(name)
    )
    if differing:
        seen = ", ".join(f"{name} {before['training'].get(name)}" for name in differing)
        raise ConfigError(
            f"{path} is of a training with {seen}. Go on with the same, or leave out --resume."
        )


def resume_state(out_dir: Path, learner: Learner, optimiser: torch.optim.AdamW) -> int:
    """Fill learner and optimiser as they were; the number of steps done."""
    stored, before = _read(out_dir)
    tensors = map_tensors(stored)
    with torch.no_grad():
        for name, parameter in learner.learned.items():
            parameter.copy_(tensors[name])
            if f"{name}.step" in tensors:
                optimiser.state[parameter] = {
                    moment: tensors[f"{name}.{moment}"].to(_device_of(moment, parameter)).clone()
                    for moment in _MOMENTS
                }
    return int(before["step"])


def _read(out_dir: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    path = out_dir / STATE_NAME
    if not path.is_file():
        raise ConfigError(f"{out_dir} holds no {STATE_NAME} to go on from: leave out --resume.")
    remedy = "Leave out --resume, and name another --out."
    try:
        stored, metadata = read_described(path)
    except CheckpointError:
        raise ConfigError(f"{path} is damaged. {remedy}") from None
    try:
        record = json.loads(metadata[_RECORD])
        if isinstance(record["training"], dict) and isinstance(record["step"], int):
            return stored, record
    except (KeyError, TypeError, ValueError):
        pass  # As below.
    raise ConfigError(f"{path} is no state of a training. {remedy}")


def _device_of(moment: str, parameter: torch.Tensor) -> torch.device:
    """AdamW counts its steps on the CPU."""
    return torch.device("cpu") if moment == "step" else parameter.device
