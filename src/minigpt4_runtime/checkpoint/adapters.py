"""What an adapter's path holds, and its place over a model folder.

Owns   the two forms of an adapter: a file with a projection, or a folder with LoRA in PEFT's form
       and perhaps a projection.
Takes  a path and a model folder; gives a config and the places that a model loads from.
Never  changes a model folder.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from minigpt4_runtime.checkpoint.adapter import check_base, find_record, lay_over
from minigpt4_runtime.checkpoint.lora import CONFIG_NAME, WEIGHTS_NAME, Lora, read_lora
from minigpt4_runtime.checkpoint.weights import StoredTensor
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.errors import CheckpointError, ConfigError
from minigpt4_runtime.formats.registry import FormatChoice

PROJECTION_NAME = "projection.safetensors"
# A field of the record of LoRA: see `replaces_lora`.
REPLACES = "replaces"


@dataclass(frozen=True)
class AdapterParts:
    """The parts of an adapter: the file of its projection, and the folder of its LoRA.

    LoRA is added to the weights that a model folder has; where its record says so, in place of
    LoRA that the folder keeps beside them.
    """

    projection: Path | None
    lora: Path | None

    @classmethod
    def find(cls, path: Path) -> "AdapterParts":
        """Look at a path. What is no folder is taken for a projection, which is read later.

        Raises:
            CheckpointError: it is a folder without an adapter.
        """
        if not path.is_dir():
            return cls(path, None)
        projection = path / PROJECTION_NAME
        parts = cls(
            projection if projection.is_file() else None,
            path if (path / CONFIG_NAME).is_file() else None,
        )
        if parts == cls(None, None):
            raise CheckpointError(
                f"{path} is a folder without {CONFIG_NAME} and {PROJECTION_NAME}. Name a folder "
                "that `minigpt4 tune` or PEFT wrote."
            )
        return parts

    def read_lora(self, config: ModelConfig, model_dir: Path) -> Lora | None:
        """The LoRA, if there is one, checked against a model.

        Raises:
            CheckpointError: it is damaged, or another model's.
        """
        if self.lora is None:
            return None
        lora = read_lora(self.lora, config.language)
        record = find_record(lora.metadata)
        if record is not None:  # PEFT's own says nothing of its model but a name.
            check_base(self.lora, record, model_dir)
        return lora

    @property
    def files(self) -> dict[str, Path]:
        """All that is read of it, by the role that a file has."""
        found = {"projection": self.projection} if self.projection else {}
        if self.lora is not None:
            found |= {"lora": self.lora / WEIGHTS_NAME, "lora_config": self.lora / CONFIG_NAME}
        return found

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each of these files, for results that are not to be taken for others.

        Raises:
            CheckpointError: a file cannot be read.
        """
        found = {}
        for role, path in self.files.items():
            try:
                with path.open("rb") as file:
                    found[role] = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
        return found


def adapted(config: ModelConfig, adapter: Path | None, model_dir: Path) -> ModelConfig:
    """The config of a model with an adapter's LoRA beside its weights.

    Raises:
        CheckpointError: the adapter is damaged, or another model's.
        ConfigError: the folder keeps adapters already.
    """
    lora = AdapterParts.find(adapter).read_lora(config, model_dir) if adapter else None
    if lora is None:
        return config
    if config.language.adapters is not None and not replaces_lora(lora):
        raise ConfigError(
            f"{model_dir} keeps LoRA adapters beside its weights already, and {adapter} is LoRA "
            "too. Take the folder that `merge` was given, or convert without --keep-lora."
        )
    return replace(config, language=replace(config.language, adapters=lora.config))


def replaces_lora(lora: Lora) -> bool:
    """Whether it takes the place of LoRA that a model folder keeps beside its weights."""
    record = find_record(lora.metadata)
    return record is not None and bool(record.get(REPLACES))


def lay_adapter_over(
    adapter: Path,
    model_dir: Path,
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    formats: FormatChoice,
) -> tuple[dict[str, StoredTensor], FormatChoice]:
    """The places of a folder's tensors with an adapter's in place of or beside them; the formats.

    `config` is that of `adapted`.

    Raises:
        CheckpointError: the adapter is damaged, or another model's.
    """
    parts, places = AdapterParts.find(adapter), dict(stored)
    if parts.projection is not None:
        places, formats = lay_over(parts.projection, model_dir, places, formats)
    lora = parts.read_lora(config, model_dir)
    if lora is not None:
        places = {name: at for name, at in places.items() if ".adapter." not in name}
    return places | dict(lora.factors if lora else {}), formats
