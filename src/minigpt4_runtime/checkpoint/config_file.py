"""A model folder's config.json, and the errors about folders that are no model folders.

Owns   the file's name and these errors.
Takes  a model folder; gives its ModelConfig.
Never  loads torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt4_runtime.checkpoint.file_kind import read_json, refuse_adapter, show_value
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.errors import CheckpointError, ConfigError

CONFIG_NAME = "config.json"
_CONVERT_FIRST = "Make a model folder of the published files with `minigpt4 convert` first."


def load_config(model_dir: Path) -> ModelConfig:
    """Read a model folder's config.json.

    Raises:
        CheckpointError: it is no model folder.
        ConfigError: its config.json holds something that cannot work.
    """
    if not model_dir.is_dir():
        state = "is a file, not a model folder" if model_dir.exists() else "does not exist"
        raise CheckpointError(
            f"{model_dir} {state}. Give a folder that `minigpt4 convert` made, or the name of a "
            "model that `minigpt4 models` lists."
        )
    path = model_dir / CONFIG_NAME
    if not path.exists():
        refuse_adapter(model_dir)
        raise CheckpointError(f"{model_dir} has no {CONFIG_NAME}. {_CONVERT_FIRST}")
    values = read_json(path)
    kind = values.get("model_type")
    if kind != "minigpt4":
        what = "a language model alone" if kind == "llama" else "another model"
        raise CheckpointError(
            f"{model_dir} holds {what} (model_type {show_value(values, 'model_type')}), "
            f"not MiniGPT-4. {_CONVERT_FIRST}"
        )
    _refuse_nulls(path, values)
    try:
        return ModelConfig.from_mapping(values)
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _refuse_nulls(path: Path, values: Mapping[str, Any]) -> None:
    """Only the Q-Former may be null."""
    named = dict(values)
    for section, settings in values.items():
        if isinstance(settings, Mapping):
            named |= {f"{section}.{name}": value for name, value in settings.items()}
    nulls = [name for name, value in named.items() if value is None and name != "qformer_config"]
    if nulls:
        raise ConfigError(f"{path}: {nulls[0]} is null; a value is wanted. Convert again.")
