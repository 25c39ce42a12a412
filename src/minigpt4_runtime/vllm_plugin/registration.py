"""The entry point: tells vLLM which classes belong to a model folder.

Owns   the names under which vLLM finds them.
Takes  nothing; vLLM calls `register` once in each of its processes.
"""

from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.registry import TokenizerRegistry

from minigpt4_runtime.vllm_plugin.folder_config import FolderConfig, TokenizerChoice

ARCHITECTURE = "MiniGPT4ForConditionalGeneration"
_ROOM = "minigpt4_runtime.vllm_plugin"


def register() -> None:
    """Make model folders known. A second call changes nothing."""
    mode = TokenizerChoice.mode
    if mode in TokenizerRegistry.tokenizers:
        return
    AutoConfig.register(FolderConfig.model_type, FolderConfig, exist_ok=True)
    TokenizerRegistry.register(mode, f"{_ROOM}.tokenizer", "FolderTokenizer")
    RENDERER_REGISTRY.register(mode, f"{_ROOM}.renderer", "DialogueRenderer")
    MODELS_CONFIG_MAP[ARCHITECTURE] = TokenizerChoice
    # By name: a worker that only checks the model's abilities does not load it.
    ModelRegistry.register_model(ARCHITECTURE, f"{_ROOM}.model:{ARCHITECTURE}")
