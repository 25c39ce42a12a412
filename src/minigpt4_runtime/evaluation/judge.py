"""The judge: a CLIP model, which puts pictures and texts into one space.

Owns   how a judge is loaded, from Hugging Face's layout or open_clip's, and what it is shown.
Takes  RGB pictures and texts; gives unit rows, whose products are cosines.
Never  reaches a network, and knows nothing of the model that is judged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minigpt4_runtime.errors import BackendUnavailableError, CheckpointError
from minigpt4_runtime.evaluation import open_clip
from minigpt4_runtime.optional import require

INSTALL = "pip install 'minigpt4-runtime[eval]'"
transformers = require("transformers", install=INSTALL)


class Judge:
    """A loaded CLIP. `digest` names its weights and what it does to pictures."""

    def __init__(self, model: Any, tokenizer: Any, pixels: Any, device: torch.device) -> None:
        self._model = model.to(device).eval()
        self._tokenizer = tokenizer
        self._pixels = pixels
        self._device = device
        self.max_tokens: int = model.config.text_config.max_position_embeddings
        self.digest = _digest(model, pixels)

    @classmethod
    def load(cls, path: Path, *, device: str = "auto") -> Judge:
        """Load a folder in Hugging Face layout, or one of open_clip, or the latter's .bin.

        Raises:
            CheckpointError: there is no whole CLIP model.
            BackendUnavailableError: the device or a package is not on this machine.
        """
        where, source = _find_device(device), _find_source(path)
        folder = source if source.is_dir() else source.parent
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        tokenizer = _load_tokenizer(folder)
        if source.is_dir():
            model = _build(source, pretrained_model_name_or_path=source, local_files_only=True)
        else:
            model = _build_open_clip(source)
        return cls(model, tokenizer, _load_preprocessing(folder, model), where)

    def embed_pictures(self, pictures: Sequence[Image]) -> Tensor:
        """N RGB pictures → (N, width) float32 on the CPU, each row of length 1."""
        pixels = self._pixels(list(pictures), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            rows = self._model.get_image_features(pixel_values=pixels.to(self._device))
        return _unit(rows.pooler_output)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts → (N, width) float32 on the CPU, each row of length 1. Long texts are cut."""
        end = self._tokenizer.eos_token_id
        ids = [row[: self.max_tokens] for row in self._encode(texts)]
        for row in ids:
            row[-1] = end  # As in training: a text that was cut ends all the same.
        # What stands behind the end is seen by nothing before it: no mask is needed.
        padded = pad_sequence([torch.tensor(row) for row in ids], True, end)
        with torch.inference_mode():
            rows = self._model.get_text_features(input_ids=padded.to(self._device))
        return _unit(rows.pooler_output)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How long each text is, begin and end included; `max_tokens` of them are read."""
        return [len(row) for row in self._encode(texts)]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        # Half a character, which no tokenizer takes, becomes a question mark.
        whole = [text.encode("utf-8", "replace").decode() for text in texts]
        return list(self._tokenizer(whole, verbose=False)["input_ids"])


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float().cpu(), dim=-1)


def _find_source(path: Path) -> Path:
    """A folder in Hugging Face layout as it is, or else open_clip's file."""
    if not path.exists():
        raise CheckpointError(
            f"There is no judge at {path}. Download one and name its folder, for example "
            "`hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K --local-dir judge`."
        )
    if path.is_file() and path.suffix != ".bin":
        raise CheckpointError(
            f"{path} is a file. Name the judge's folder, or the {open_clip.FILE_NAME} of open_clip."
        )
    if path.is_file() or (path / "config.json").exists():
        return path
    if not (path / open_clip.FILE_NAME).exists():
        raise CheckpointError(
            f"{path} has neither config.json nor {open_clip.FILE_NAME}. Name the folder of a CLIP "
            "model."
        )
    return path / open_clip.FILE_NAME


def _build(source: Path, **arguments: Any) -> Any:
    """Make a CLIPModel, and refuse one with weights that are missing or were drawn by lot."""
    try:
        model, info = transformers.CLIPModel.from_pretrained(
            dtype=torch.float32, output_loading_info=True, **arguments
        )
    except SafetensorError as error:
        raise CheckpointError(
            f"The weights in {source} are damaged ({error}). Download them again."
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{source} is no CLIP model that can be loaded: {reason}") from None
    faults = {name for kind in ("missing_keys", "mismatched_keys") for name in info[kind]}
    if faults:
        raise CheckpointError(
            f"{source} is no whole CLIP model: {len(faults)} weights are missing or of another "
            f"shape, {sorted(map(str, faults))[0]} among them."
        )
    return model


def _build_open_clip(path: Path) -> Any:
    config, weights = open_clip.read(path)
    return _build(
        path,
        pretrained_model_name_or_path=None,
        config=transformers.CLIPConfig(**config),
        state_dict=weights,
    )


def _load_tokenizer(folder: Path) -> Any:
    # Without its files transformers would make a tokenizer that knows no word.
    if not ((folder / "tokenizer.json").exists() or (folder / "merges.txt").exists()):
        raise CheckpointError(
            f"{folder} has no tokenizer. Put tokenizer.json, or vocab.json and merges.txt, from "
            "the judge's page into it."
        )
    try:
        return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"The tokenizer in {folder} cannot be read ({error}).") from None


def _load_preprocessing(folder: Path, model: Any) -> Any:
    """The judge's own resizing, cutting and normalising, by Pillow and numpy."""
    processor = transformers.CLIPImageProcessorPil
    if (folder / "preprocessor_config.json").exists():
        return processor.from_pretrained(folder, local_files_only=True)
    side = model.config.vision_config.image_size
    given = open_clip.read_preprocessing(folder)
    means = {f"image_{name}": given[name] for name in ("mean", "std") if name in given}
    return processor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **means
    )


def _find_device(name: str) -> torch.device:
    if name == "auto":
        found = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BackendUnavailableError(
            f"The judge cannot run on {name} ({str(error).splitlines()[0]}). Try --device cpu."
        ) from None


def _digest(model: Any, pixels: Any) -> str:
    digest = hashlib.sha256(pixels.to_json_string().encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().view(-1).numpy())
    return digest.hexdigest()
