"""The model as vLLM computes it: our image side, vLLM's own Llama.

Owns   the pairing of the two, and the loading of both from one model folder.
Takes  vLLM's settings, of which the model's path is a model folder.
Never  divides the image side: every rank of a tensor-parallel group has the whole of it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from minigpt4_runtime.checkpoint.load import load_vision
from minigpt4_runtime.export.language import read_language
from minigpt4_runtime.vllm_plugin.folder_config import LANGUAGE_MODULE
from minigpt4_runtime.vllm_plugin.processor import BlankPictures, FolderInfo, PictureProcessor
from minigpt4_runtime.vllm_plugin.tokenizer import IMAGE_SLOT
from minigpt4_runtime.vllm_plugin.wide_heads import widen


@MULTIMODAL_REGISTRY.register_processor(
    PictureProcessor, info=FolderInfo, dummy_inputs=BlankPictures
)
class MiniGPT4ForConditionalGeneration(nn.Module, SupportsLoRA, SupportsMultiModal, SupportsPP):
    """See the module."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    # A PEFT adapter of the language model has the names of the Llama alone.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.": f"{LANGUAGE_MODULE}.model.", "lm_head.": f"{LANGUAGE_MODULE}.lm_head.",
        }
    )  # fmt: skip

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        settings = vllm_config.model_config
        config = settings.hf_config
        self.config = config
        self._folder = Path(settings.model)
        # Without vLLM, mypy takes its methods for submodules.
        self.configure_mm_token_handling(  # type: ignore[operator]
            vocab_size=config.text_config.vocab_size, mm_token_ids=[config.image_token_index]
        )
        device = torch.get_default_device()
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            # With torch's default device a mapped weight would be copied; the tower is moved whole.
            with torch.device("cpu"):
                vision = load_vision(self._folder, dtype=settings.dtype)
            self.vision = vision.to(device)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, LANGUAGE_MODULE),
                architectures=["LlamaForCausalLM"],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        """What stands for a picture in a prompt of text."""
        return IMAGE_SLOT

    def embed_multimodal(self, *, pixel_values: Tensor | None = None, **_: object) -> Any:
        """(N, 3, S, S) → (N, R, hidden) rows."""
        if pixel_values is None:
            return []
        weight = self.vision.ln_vision.weight
        return self.vision(pixel_values.to(weight.device, weight.dtype))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> Tensor | IntermediateTensors:
        """Rows of text and pictures → hidden rows. vLLM has put the pictures' rows in place."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Hidden rows → logits."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Give vLLM's Llama its weights by their published names; the image side has its own.

        `weights` is left unread: it has our names, and for integers our layouts.
        """
        found = read_language(self._folder)
        language: Iterator[tuple[str, Tensor]] = (
            (each.name, each.tensor) for each in found.stream()
        )
        head_dim = found.config.head_dim
        if (factor := self.config.text_config.head_dim // head_dim) > 1:
            language = widen(language, head_dim, factor)
        loaded = {
            f"{LANGUAGE_MODULE}.{name}" for name in self.language_model.load_weights(language)
        }
        return loaded | {f"vision.{name}" for name, _ in self.vision.named_parameters()}

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which modules are the language model's, for LoRA."""
        return MultiModelKeys.from_string_field(
            language_model=LANGUAGE_MODULE, connector="vision.projection", tower_model="vision"
        )
