"""A model folder's tokenizer in the form that vLLM asks for.

Owns   vLLM's questions to a tokenizer: ids, pieces and texts, how a prompt of text is read, and
       which ids end an answer.
Takes  a model folder. In a text, `<ImageHere>` is the place of a picture; what lies around it is
       tokenised apart, after a BOS.
Never  turns a user's text into a control id.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from transformers import BatchEncoding

from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.folder import TOKENIZER_NAME
from minigpt4_runtime.messages import ImageSource
from minigpt4_runtime.text.prompt import Prompt, Template
from minigpt4_runtime.text.tokenizer import Tokenizer

IMAGE_SLOT = "<ImageHere>"


class FolderTokenizer:
    """See the module. `image_token_id` is the first id past the vocabulary."""

    is_fast = False
    truncation_side = "left"

    def __init__(self, folder: Path) -> None:
        self.text = Tokenizer(folder / TOKENIZER_NAME)
        self.image_token_id = load_config(folder).language.vocab_size
        self.name_or_path = str(folder)
        self.bos_token_id, self.eos_token_id = self.text.bos_id, self.text.eos_id
        self.pad_token_id = self.text.eos_id
        self.vocab_size = self.text.vocab_size
        self.max_token_id = self.image_token_id
        self._pieces = [self.text.piece_of(id) for id in range(self.vocab_size)]
        self._ids = {piece: id for id, piece in enumerate(self._pieces)}
        self.max_chars_per_token = max(map(len, self._pieces))
        self.all_special_ids = [i for i in range(self.vocab_size) if not self.text.is_text(i)]
        self.all_special_tokens = self.convert_ids_to_tokens(self.all_special_ids)

    @classmethod
    def from_pretrained(cls, path_or_repo_id: str | Path, *_: Any, **__: Any) -> Self:
        """Read the tokenizer of a folder."""
        return cls(Path(path_or_repo_id))

    def num_special_tokens_to_add(self) -> int:
        """The BOS."""
        return 1

    def __hash__(self) -> int:
        return id(self)

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(self, text: str | list[str], *_: Any, **settings: Any) -> BatchEncoding:
        """Texts → their ids."""
        if isinstance(text, str):
            return BatchEncoding({"input_ids": self.encode(text, **settings)})
        return BatchEncoding({"input_ids": [self.encode(each, **settings) for each in text]})

    def encode(
        self,
        text: str,
        truncation: bool | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[int]:
        """A text with places for pictures → ids; a cut keeps the end."""
        pieces = tuple((piece,) for piece in text.split(IMAGE_SLOT))
        prompt = Prompt(pieces, tuple(ImageSource(b"") for _ in pieces[1:]))
        ids = self.encode_prompt(prompt)[0 if add_special_tokens else 1 :]
        return ids[-max_length:] if truncation and max_length else ids

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """A rendered dialogue → ids, one for each picture."""
        encoded = self.text.encode_prompt(
            prompt, rows_per_image=1, image_token_id=self.image_token_id
        )
        return list(encoded.token_ids)

    def decode(self, ids: Sequence[int] | int, skip_special_tokens: bool = False) -> str:
        """Ids → text. Control ids are left out in any case."""
        return self.text.decode([ids] if isinstance(ids, int) else ids)

    def convert_ids_to_tokens(
        self, ids: Sequence[int], skip_special_tokens: bool = False
    ) -> list[str]:
        """Ids → pieces, an empty one for an id past the vocabulary."""
        return [
            self._pieces[id] if 0 <= id < self.vocab_size else ""
            for id in ids
            if not skip_special_tokens or self.text.is_text(id)
        ]

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> Any:
        """Pieces → ids; an unknown piece is the end."""
        if isinstance(tokens, str):
            return self._ids.get(tokens, self.eos_token_id)
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Pieces → text."""
        return self.text.decode([self._ids[token] for token in tokens if token])

    def get_vocab(self) -> dict[str, int]:
        """All pieces."""
        return dict(self._ids)

    def get_added_vocab(self) -> dict[str, int]:
        """None: pieces all come from the sentencepiece model."""
        return {}

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, **_: Any
    ) -> str:
        """Not used: the renderer writes dialogues, as ids."""
        raise NotImplementedError("Dialogues are rendered as ids; use the chat interface of vLLM.")


def find_stop_ids(tokenizer: Tokenizer, template: Template) -> list[int]:
    """The single ids that end an answer: that of </s>, and of each stop that is one id.

    A stop that the vocabulary can also spell as several ids has to be given to vLLM as text.
    """
    spelled = [
        id
        for id in range(tokenizer.vocab_size)
        if tokenizer.is_text(id) and tokenizer.decode([id]).strip() in template.stops
    ]
    return [tokenizer.eos_id, *spelled]
