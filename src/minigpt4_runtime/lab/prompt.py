"""A prompt to be studied: ids with places for pictures, and the pictures as pixels.

Owns   `StudiedPrompt`, and the reading of raw texts that messages cannot say.
Takes  messages, or a text with `<ImageHere>` in it, and pictures.
Never  opens a picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.messages import ImageSource
from minigpt4_runtime.text.prompt import Control, Piece, Prompt
from minigpt4_runtime.text.tokenizer import ImageSpan

IMAGE_PLACE = "<ImageHere>"
_CONTROLS = {control.value: control for control in Control}


@dataclass(frozen=True, eq=False)
class StudiedPrompt:
    """A prompt as the model takes it.

    `token_ids` has T ids, those of image rows among them, which stand in `image_spans`; the answer
    starts at `answer_start`: before T where the prompt has begun it. `pixels` are its N pictures,
    or those of B variants one after the other: (B·N, 3, S, S) in 0…1. `embeddings` (B·N, R, C)
    stand there instead of what is seen in them. `begun` is the given beginning of the answer.
    """

    token_ids: tuple[int, ...]
    image_spans: tuple[ImageSpan, ...]
    answer_start: int
    text: str
    begun: str
    pixels: Tensor
    embeddings: Tensor | None = None

    def showing(self, pixels: Tensor) -> StudiedPrompt:
        """The same about other pictures, or about B variants of them: (B·N, 3, S, S) in 0…1."""
        return replace(self, pixels=pixels, embeddings=None)

    def reading(self, embeddings: Tensor) -> StudiedPrompt:
        """The same with other rows in the place of pictures: (B·N, R, C)."""
        return replace(self, embeddings=embeddings)

    @property
    def num_variants(self) -> int:
        """B: how many answers are computed side by side."""
        count = len(self.pixels if self.embeddings is None else self.embeddings)
        num_images = len(self.image_spans)
        if num_images == 0:
            return 1
        if count == 0 or count % num_images:
            raise RequestError(
                f"The prompt has {num_images} pictures and was given {count}. Give as many, or a "
                "multiple for variants side by side."
            )
        return count // num_images

    @property
    def image_columns(self) -> slice:
        """The rows of its only picture, as a slice of the sequence.

        Raises:
            RequestError: it has none, or several.
        """
        if len(self.image_spans) != 1:
            raise RequestError(
                f"The prompt has {len(self.image_spans)} pictures, not one. Take image_spans."
            )
        (span,) = self.image_spans
        return slice(span.start, span.start + span.num_rows)


def read_raw(text: str, pictures: Sequence[ImageSource]) -> Prompt:
    """A text as it is: `<ImageHere>` is a picture's place, `<s>` and `</s>` are control ids.

    Raises:
        RequestError: it has not as many places as there are pictures.
    """
    pieces = text.split(IMAGE_PLACE)
    if len(pieces) - 1 != len(pictures):
        raise RequestError(
            f"The text has {len(pieces) - 1} places {IMAGE_PLACE} and there are {len(pictures)} "
            "pictures. Give one for each place."
        )
    return Prompt(tuple(map(_read_piece, pieces)), tuple(pictures))


def _read_piece(text: str) -> Piece:
    parts = re.split(f"({'|'.join(map(re.escape, _CONTROLS))})", text)
    return tuple(_CONTROLS.get(part, part) for part in parts if part)
