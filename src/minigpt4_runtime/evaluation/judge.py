"""The judge: a CLIP model, which embeds images and texts in one space.

Owns   the loading of a judge, in Hugging Face's or open_clip's layout, and its preprocessing.
Takes  RGB images and texts; gives rows of length 1, whose products are cosines.
Never  reaches a network.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minigpt4_runtime.errors import BackendUnavailableError, CheckpointError
from minigpt4_runtime.evaluation import open_clip
from minigpt4_runtime.optional import require

transformers = require("transformers", extra="eval")


class Judge:
    """A loaded CLIP. `digest` identifies its weights and its preprocessing."""

    def __init__(self, model: Any, tokenizer: Any, pixels: Any, device: torch.device) -> None:
        self._model = model.to(device).eval()
        self._tokenizer = tokenizer
        self._pixels = pixels
        self._device = device
        self.max_tokens: int = model.config.text_config.max_position_embeddings
        self.digest = _digest(model, pixels)

    @classmethod
    def load(cls, path: Path, *, device: str = "auto") -> Self:
        """Load a folder in Hugging Face's or open_clip's layout, or open_clip's .bin.

        Raises:
            CheckpointError: the CLIP model is missing, incomplete or damaged.
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
            given, weights = open_clip.read(source)
            config = transformers.CLIPConfig(**given)
            model = _build(
                source, pretrained_model_name_or_path=None, config=config, state_dict=weights
            )
        return cls(model, tokenizer, _load_preprocessing(folder, model), where)

    def embed_images(self, images: Sequence[Image]) -> Tensor:
        """N RGB images → (N, width) float32 on the CPU, each row of length 1."""
        pixels = self._pixels(list(images), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            rows = self._model.get_image_features(pixel_values=pixels.to(self._device))
        return _unit(rows.pooler_output)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts → (N, width) float32 on the CPU, each row of length 1. Long texts are cut."""
        end = self._tokenizer.eos_token_id
        ids = [row[: self.max_tokens] for row in self._encode(texts)]
        for row in ids:
            row[-1] = end  # As in training: a cut text has an end too.
        # Attention is causal: no mask is needed for the padding behind the end.
        padded = pad_sequence([torch.tensor(row) for row in ids], True, end)
        with torch.inference_mode():
            rows = self._model.get_text_features(input_ids=padded.to(self._device))
        return _unit(rows.pooler_output)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Each text's length in tokens, including begin and end; `max_tokens` are read."""
        return [len(row) for row in self._encode(texts)]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        # Tokenizers refuse a lone surrogate: it becomes a question mark.
        whole = [text.encode("utf-8", "replace").decode() for text in texts]
        return list(self._tokenizer(whole, verbose=False)["input_ids"])


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float().cpu(), dim=-1)


def _find_source(path: Path) -> Path:
    """A folder in Hugging Face's layout, or else open_clip's file."""
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
    """Make a CLIPModel, and refuse one with missing or randomly initialised weights."""
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


def _load_tokenizer(folder: Path) -> Any:
    # Without these files transformers would make a tokenizer without a vocabulary.
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
    """The judge's own resizing, cropping and normalising, by Pillow and numpy."""
    processor = transformers.CLIPImageProcessorPil
    if (folder / "preprocessor_config.json").exists():
        return processor.from_pretrained(folder, local_files_only=True)
    side = model.config.vision_config.image_size
    means = {f"image_{name}": each for name, each in open_clip.read_preprocessing(folder).items()}
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
