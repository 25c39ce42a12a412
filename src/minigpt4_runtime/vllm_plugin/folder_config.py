"""A model folder's settings, as vLLM reads them.

Owns   the Hugging Face config of a folder: its Llama's, with the weight format of the manifest,
       and the ids that end an answer.
Takes  config.json as transformers has read it, and the folder's path.
"""

from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import LlamaConfig, PretrainedConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.folder import TOKENIZER_NAME
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.export.language import PublishedLanguage, read_language
from minigpt4_runtime.text.prompt import find_template
from minigpt4_runtime.text.tokenizer import Tokenizer
from minigpt4_runtime.vllm_plugin.tokenizer import find_stop_ids
from minigpt4_runtime.vllm_plugin.wide_heads import widen_factor

LANGUAGE_MODULE = "language_model"


class FolderConfig(PretrainedConfig):
    """See the module. The image side's settings are read from the folder where it is made."""

    model_type = "minigpt4"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": LlamaConfig}

    def __init__(self, text_config: Any = None, **settings: Any) -> None:
        if not isinstance(text_config, PretrainedConfig):
            text_config = LlamaConfig(**(text_config or {}))
        self.text_config = text_config
        super().__init__(**settings)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """Complete config.json with what the folder's other files say."""
        folder = Path(kwargs.get("name_or_path") or config_dict["_name_or_path"])
        config = load_config(folder)
        language = read_language(folder)
        text_config = language.settings(prefix=f"{LANGUAGE_MODULE}.")
        factor = head_factor(language)
        text_config["head_dim"] = factor * config.language.head_dim
        whole: dict[str, Any] = {
            "architectures": config_dict["architectures"],
            "text_config": text_config,
            "dtype": text_config["torch_dtype"],
            "eos_token_id": find_stop_ids(
                Tokenizer(folder / TOKENIZER_NAME), find_template(config.template)
            ),
            "image_token_index": config.language.vocab_size,
        }
        if "quantization_config" in text_config:
            whole["quantization_config"] = text_config.pop("quantization_config")
        found: Self = super().from_dict(whole, **kwargs)
        return found


def head_factor(language: PublishedLanguage) -> int:
    """How many times wider vLLM's attention wants the heads: it has few widths on a CPU.

    Raises:
        ConfigError: they cannot be widened.
    """
    if not current_platform.is_cpu():
        return 1
    known = CPUAttentionBackend.get_supported_head_sizes()
    factor = widen_factor(language.config.head_dim, known)
    can_widen = language.layer_format.name in {"float", "w8a8"} and not language.config.rope_scaling
    if factor > 1 and not can_widen:
        raise ConfigError(
            f"vLLM's attention on a CPU has no heads of {language.config.head_dim}, and only those "
            "of floats or w8a8 with plain positions can be widened. Run it with minigpt4 itself."
        )
    return factor


class TokenizerChoice(VerifyAndUpdateConfig):
    """Has vLLM read and render text as we do, unless the user chose a mode, and checks settings."""

    mode = "minigpt4"

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Called by vLLM when it has found the model's class."""
        if model_config.tokenizer_mode in {"auto", "hf"}:
            model_config.tokenizer_mode = TokenizerChoice.mode

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Called by vLLM when all settings are known.

        Raises:
            ConfigError: adapters are wanted, whose heads would be narrower than the model's.
        """
        if vllm_config.lora_config is None:
            return
        language = read_language(Path(vllm_config.model_config.model))
        if head_factor(language) > 1:
            raise ConfigError(
                f"vLLM's attention on a CPU has no heads of {language.config.head_dim}, so the "
                "model's are widened, and a LoRA adapter would not fit the wider ones. Merge it "
                "into the weights."
            )
