"""A prompt to be studied: ids with places for pictures, and the pictures as pixels.

Owns   `StudiedPrompt`. Takes ids and pixels.
Never  opens a picture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.text.tokenizer import ImageSpan


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
        if num_images == count == 0:
            return 1
        if num_images == 0 or count == 0 or count % num_images:
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
