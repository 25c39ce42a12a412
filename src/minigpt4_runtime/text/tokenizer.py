"""Pieces → ids with image spans; ids → text as it grows.

Owns   the sentencepiece model of a model folder, and the places of control ids.
Takes  a rendered Prompt, or ids; gives an EncodedPrompt, or text.
Never  turns a user's text into a control id: only what a template places becomes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.text.prompt import Control, Piece, Prompt


@dataclass(frozen=True)
class ImageSpan:
    """Where an image's rows stand in the prompt: token_ids[start : start + num_rows]."""

    start: int
    num_rows: int


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model takes it. Image rows hold `image_token_id` in `token_ids`.

    `pieces` are the ids of each text piece around the images, and `text` is the whole for reading.
    """

    token_ids: tuple[int, ...]
    image_spans: tuple[ImageSpan, ...]
    pieces: tuple[tuple[int, ...], ...]
    text: str


class Tokenizer:
    """A sentencepiece model, used as the original uses transformers' slow Llama tokenizer."""

    def __init__(self, model_path: Path) -> None:
        """Load tokenizer.model.

        Raises:
            CheckpointError: the file is missing or is no sentencepiece model.
        """
        try:
            self._model = SentencePieceProcessor(model_proto=model_path.read_bytes())
            self.vocab_size: int = self._model.vocab_size()
        except OSError as error:
            raise CheckpointError(
                f"{model_path} cannot be read ({error.strerror}). Convert the model again."
            ) from None
        except (RuntimeError, IndexError):
            raise CheckpointError(
                f"{model_path} is not a sentencepiece model. Take tokenizer.model from the "
                "published language model."
            ) from None
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        if not self.vocab_size or min(self.bos_id, self.eos_id) < 0:
            raise CheckpointError(
                f"{model_path} is a sentencepiece model without <s> and </s>. Take "
                "tokenizer.model from the published language model."
            )

    def encode(self, text: str) -> list[int]:
        """Plain text → ids, without BOS. Never a control id, whatever the text says."""
        return list(self._model.encode(text))

    def encode_begun(self, text: str) -> tuple[list[int], str]:
        """A text to be continued → its ids, and the space that they add to it, if any.

        Most vocabularies write a space before a word; some behind it, with the word as one token.
        """
        text = text.strip()
        ids, spaced = self.encode(text), self.encode(text + " ")
        return (spaced, " ") if text and len(spaced) < len(ids) else (ids, "")

    def encode_prompt(
        self, prompt: Prompt, *, rows_per_image: int, image_token_id: int
    ) -> EncodedPrompt:
        """Tokenise each piece on its own and leave room for the image rows between them.

        The answer's beginning is tokenised apart too, so that its ids are as from the model itself.
        """
        # Pieces are tokenised apart, as upstream does: joining the text first can change the ids.
        pieces = [self._encode_piece(piece) for piece in prompt.pieces]
        pieces[-1] += self.encode_begun(prompt.begun)[0]
        pieces[0].insert(0, self.bos_id)
        token_ids, spans = list(pieces[0]), []
        for piece in pieces[1:]:
            spans.append(ImageSpan(len(token_ids), rows_per_image))
            token_ids += [image_token_id] * rows_per_image + piece
        return EncodedPrompt(
            tuple(token_ids), tuple(spans), tuple(tuple(piece) for piece in pieces), prompt.text
        )

    def _encode_piece(self, piece: Piece) -> list[int]:
        controls = {Control.BOS: self.bos_id, Control.EOS: self.eos_id}
        ids: list[int] = []
        for each in piece:
            ids += [controls[each]] if isinstance(each, Control) else self.encode(each)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Ids → text. Control ids, and ids that the tokenizer does not know, are left out."""
        return str(self._model.decode([i for i in token_ids if self.is_text(i)]))

    def is_text(self, token_id: int) -> bool:
        """Whether this id is shown in an answer: known, and no control id."""
        known = 0 <= token_id < self.vocab_size
        return (
            known and not self._model.is_control(token_id) and not self._model.is_unknown(token_id)
        )

    def is_byte(self, token_id: int) -> bool:
        """Whether this id is one raw byte of a character that the vocabulary lacks."""
        return bool(self._model.is_byte(token_id))

    def piece_of(self, token_id: int) -> str:
        """An id as the vocabulary writes it, with ▁ for a space."""
        return str(self._model.id_to_piece(token_id))

    def bytes_of(self, token_id: int) -> bytes:
        """The text of an id within a text, as UTF-8; the name of a control id, as `</s>`."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        piece = self.piece_of(token_id)
        if self.is_byte(token_id):
            return bytes([int(piece[3:-1], 16)])  # Written as <0x0A>.
        return piece.replace("\u2581", " ").encode()


class TextStream:
    """Ids → text as it grows, never cut inside a character.

    `feed` gives the text that is certain; `flush` gives the rest. Together they give the text of
    `Tokenizer.decode` for all ids at once.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """`before` are the ids of the text that this one continues."""
        self._tokenizer = tokenizer
        self._context = list(before)  # The last ids given out: they decide about a space.
        self._waiting: list[int] = []

    def fork(self) -> TextStream:
        """An independent copy."""
        other = TextStream(self._tokenizer)
        other._context, other._waiting = list(self._context), list(self._waiting)
        return other

    def feed(self, token_id: int) -> str:
        """Take one more id and give the text that no later id can change."""
        if not self._tokenizer.is_text(token_id):
            return ""
        self._waiting.append(token_id)
        # A run of raw bytes may be half a character: wait until something else follows,
        # or until the bytes read as whole characters.
        if self._tokenizer.is_byte(token_id) and self._decode_waiting().endswith("\ufffd"):
            return ""
        return self.flush()

    def flush(self) -> str:
        """Give the waiting text, with any incomplete character, at the end of the ids."""
        if not self._waiting:
            return ""
        text = self._decode_waiting()
        # The tokenizer would drop a context of blanks alone, as the space before a text.
        self._context = self._waiting if text.strip() else self._context + self._waiting
        self._waiting = []
        return text

    def _decode_waiting(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._waiting)[len(before) :]
