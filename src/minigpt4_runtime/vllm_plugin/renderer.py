"""A chat as vLLM gets it → the ids of the model's template.

Owns   the rendering of dialogues, in which pieces around pictures are tokenised apart.
Takes  the messages of a request; vLLM fetches the pictures. Gives ids, with one for each picture.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.renderers.base import BaseRenderer
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.inputs import DictPrompt
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt
from vllm.renderers.params import ChatParams

from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.messages import read_messages
from minigpt4_runtime.text.prompt import find_template, render
from minigpt4_runtime.vllm_plugin.conversation import read_conversation
from minigpt4_runtime.vllm_plugin.tokenizer import FolderTokenizer

Parsed = tuple[list[Any], Mapping[str, Any] | None, Mapping[str, Any] | None]


class DialogueRenderer(BaseRenderer[FolderTokenizer]):
    """See the module."""

    def __init__(self, config: VllmConfig, tokenizer: FolderTokenizer | None) -> None:
        super().__init__(config, tokenizer)
        self._template = find_template(load_config(Path(config.model_config.model)).template)

    def render_messages(
        self, messages: list[Any], params: ChatParams
    ) -> tuple[list[Any], DictPrompt]:
        """Messages → the conversation as vLLM keeps it, and the prompt."""
        return self._render(parse_chat_messages(messages, **self._reading(params)))

    async def render_messages_async(
        self, messages: list[Any], params: ChatParams
    ) -> tuple[list[Any], DictPrompt]:
        """The same, while pictures are fetched."""
        return self._render(await parse_chat_messages_async(messages, **self._reading(params)))

    def _reading(self, params: ChatParams) -> dict[str, Any]:
        return {
            "model_config": self.model_config,
            "content_format": "openai",
            "media_io_kwargs": params.media_io_kwargs,
            "mm_processor_kwargs": params.mm_processor_kwargs,
        }

    def _render(self, parsed: Parsed) -> tuple[list[Any], DictPrompt]:
        conversation, media, uuids = parsed
        try:
            sources, dialogue = read_conversation(conversation)
            rendered = render(read_messages(dialogue), self._template)
        except RequestError as error:
            raise ValueError(str(error)) from None  # What vLLM answers with status 400.
        prompt = parse_dec_only_prompt(self.get_tokenizer().encode_prompt(rendered))
        # A template may put a message's pictures before its text: they are given in its order.
        order = [sources.index(source) for source in rendered.images]
        for key, given in (("multi_modal_data", media), ("multi_modal_uuids", uuids)):
            if given:
                prompt[key] = {kind: [each[i] for i in order] for kind, each in given.items()}
        return conversation, prompt
