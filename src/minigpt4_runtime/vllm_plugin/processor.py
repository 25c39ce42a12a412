"""Pictures as vLLM has them → our pixels, and the rows that they take in a prompt.

Owns   vLLM's multimodal processor for a model folder.
Takes  files' bytes, PIL images or arrays. They are opened, turned, resized and normalised by
       `images.pixels`, never by vLLM.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.errors import ImageError
from minigpt4_runtime.images.pixels import open_rgb, prepare
from minigpt4_runtime.messages import ImageSource
from minigpt4_runtime.vllm_plugin.tokenizer import IMAGE_SLOT


class PictureParser(MultiModalDataParser):
    """Opens pictures as the runtime does, before vLLM would convert them."""

    def _parse_image_data(self, data: Any) -> ImageProcessorItems | None:
        if data is None:
            return None
        given = data if isinstance(data, list | tuple) else [data]
        return ImageProcessorItems([each if each is None else _open(each) for each in given])


def _open(given: Any) -> Any:
    content = given.original_bytes if isinstance(given, MediaWithBytes) else given
    try:
        return open_rgb(ImageSource(content))
    except ImageError as error:
        raise ValueError(str(error)) from None  # What vLLM answers with status 400.


class FolderInfo(BaseProcessingInfo):
    """What vLLM plans with."""

    @cached_property
    def config(self) -> ModelConfig:
        """The folder's settings."""
        return load_config(Path(self.ctx.model_config.model))

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of pictures."""
        return {"image": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Every picture takes the same number of rows."""
        return {"image": self.config.rows_per_image}

    def get_data_parser(self) -> PictureParser:
        """How pictures are opened."""
        return PictureParser()


class BlankPictures(BaseDummyInputsBuilder[FolderInfo]):
    """Pictures for vLLM's first run, by which it measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """A slot for each picture."""
        return IMAGE_SLOT * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """White pictures of the tower's size."""
        side = self.info.config.vision.image_size
        pictures = self._get_dummy_images(
            width=side,
            height=side,
            num_images=mm_counts.get("image", 0),
            overrides=mm_options.get("image"),
        )
        return {"image": pictures}


class PictureProcessor(BaseMultiModalProcessor[FolderInfo]):
    """Opened pictures → pixels, and a picture's id in a prompt → as many as it has rows."""

    def _call_hf_processor(
        self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        vision = self.info.config.vision
        pixels = [torch.from_numpy(prepare(each, vision).values) for each in hf_data["images"]]
        return BatchFeature({"pixel_values": torch.stack(pixels)})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        config = self.info.config
        image_id = config.language.vocab_size
        rows = [image_id] * config.rows_per_image
        return [PromptReplacement(modality="image", target=[image_id], replacement=rows)]
