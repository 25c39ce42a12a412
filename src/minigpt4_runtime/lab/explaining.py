"""The way to an `Explanation`: passes with attention in view, a few of the answer's ids at a time.

Owns   the way from the rows of a picture to its patches, and from ids to words.
Takes  a Lab, a prompt and an answer.
Never  holds the attention of more than a few ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy
import torch
from PIL import Image
from torch import Tensor

from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.lab.explanation import (
    END,
    Band,
    Explanation,
    Floats,
    Guess,
    Look,
    Piece,
    Word,
)
from minigpt4_runtime.lab.prompt import StudiedPrompt
from minigpt4_runtime.text.tokenizer import TextStream, Tokenizer

if TYPE_CHECKING:
    from minigpt4_runtime.lab.lab import Lab

NUM_OTHERS = 5
# So many shares of attention are in memory at a time: 64 MiB of float32.
_SHARES_AT_ONCE = 2**24
_IDS_AT_ONCE = 32
# Scripts that put no space between words begin here: Chinese, Japanese, Korean.
_FIRST_WITHOUT_SPACES = "\u2e80"


@torch.no_grad()
def explain(
    lab: Lab, tokenizer: Tokenizer, prompt: StudiedPrompt, token_ids: Sequence[int]
) -> Explanation:
    """See `Lab.explain`."""
    if not token_ids:
        raise RequestError("The answer is empty: there is no word to explain.")
    _check(prompt)
    seen = _Seen.by(lab, prompt)
    for hidden, attention in _passes(lab, prompt, token_ids):
        seen.add(hidden, attention, token_ids)
    answer = lab.answer(prompt, token_ids)
    texts = piece_texts(tokenizer, prompt, token_ids)
    words = words_of(texts, answer.text)
    num_said = words[-1].first if words[-1].text == END else len(token_ids)
    pieces = tuple(
        Piece(token_id, text, Guess(label(tokenizer, token_id), log), _guesses(tokenizer, others),
              since)
        for token_id, text, log, others, since in zip(
            token_ids, texts, seen.said, seen.others, _settled(seen.best, token_ids), strict=True)
    )  # fmt: skip
    return Explanation(
        prompt=prompt.text, answer=answer.text, pieces=pieces, words=words, bands=seen.bands,
        heat=numpy.concatenate(seen.heat, 1), looks=numpy.concatenate(seen.looks),
        heads=numpy.concatenate(seen.heads)[: num_said or None].mean(0),
        columns=(*_columns(tokenizer, prompt), *(each.said.text for each in pieces[:-1])),
        map=_even(seen.maps), pictures=tuple(map(_as_picture, prompt.pixels)),
        lens=tuple(_guesses(tokenizer, row) for row in zip(*seen.best, strict=True)),
    )  # fmt: skip


@torch.no_grad()
def look(lab: Lab, tokenizer: Tokenizer, prompt: StudiedPrompt, answer: str, at: int) -> Look:
    """See `Lab.look`."""
    token_ids = lab.ids_of(answer)
    if not (0 <= at < len(answer) and answer[at:].strip() and token_ids):
        raise RequestError(
            f"at is {at}; the answer has {len(answer.rstrip())} characters, counted from 0, and "
            "none behind them."
        )
    _check(prompt)
    word, start = _word_at(piece_texts(tokenizer, prompt, token_ids), answer, at)
    first = len(prompt.token_ids) - 1 + word.first
    keep = {"attention": "all", "rows": slice(first, first + word.stop - word.first)}
    # What stands behind the word changes nothing: the last id only makes the row that chose it.
    attention = lab.forward(prompt, answer=token_ids[: word.stop], keep=keep).attention
    assert attention is not None
    seen = _Seen.by(lab, prompt)
    on_rows = [attention[:, 0, ..., first:stop] for first, stop in seen.spans]
    heat = seen.heat_on(on_rows, attention[:, 0])[0].mean(0)
    on_pictures = sum(float(each.sum(-1).mean()) for each in on_rows)
    return Look(word.text, start, start + len(word.text), heat, on_pictures)


def _word_at(texts: Sequence[str], answer: str, at: int) -> tuple[Word, int]:
    """The word that a character is in, or the next one, and where it begins."""
    words, start = words_of(texts, answer), 0
    for word in words:
        # What the vocabulary lacks is in no word.
        start = max(start, answer.find(word.text, start))
        if at < start + len(word.text):
            break
        start += len(word.text)
    return word, start


def _check(prompt: StudiedPrompt) -> None:
    if prompt.num_variants != 1 or prompt.embeddings is not None:
        raise RequestError("It takes a prompt with its own pictures, not with variants.")


def _guesses(tokenizer: Tokenizer, ids: Iterable[tuple[int, float]]) -> tuple[Guess, ...]:
    return tuple(Guess(label(tokenizer, token_id), log) for token_id, log in ids)


def bands_of(num_layers: int) -> tuple[Band, ...]:
    """All layers, and where there are enough of them their thirds."""
    whole = Band("all layers", 0, num_layers)
    if num_layers < 3:
        return (whole,)
    cuts = [round(num_layers * third / 3) for third in range(4)]
    names = ("first third", "middle third", "last third")
    thirds = (Band(*each) for each in zip(names, cuts, cuts[1:], strict=False))
    return (whole, *thirds)


def row_places(lab: Lab, prompt: StudiedPrompt) -> Tensor:
    """Where in its picture each row was taken from: (N, R, patches), float32.

    A row of the Q-Former has no place of its own: it has its cross-attention to the patches, mean
    over layers and heads; what that gives to the class row is lost. Without a Q-Former a row is a
    few neighbouring patches, each of which gets an equal part of it.
    """
    config, num_pictures = lab.config, len(prompt.image_spans)
    if config.qformer is None or num_pictures == 0:
        return _neighbours(config).to(lab.device).expand(num_pictures, -1, -1)
    # One picture at a time: the tower's own memory is large.
    return torch.cat([
        lab.encode(pixels[None], cross_attention=True).cross_attention.mean((0, 2))[:, :, 1:]
        for pixels in prompt.pixels
    ])  # fmt: skip


def _neighbours(config: ModelConfig) -> Tensor:
    num_rows, num_patches = config.rows_per_image, config.vision.num_patches
    each = num_patches // num_rows
    return torch.eye(num_rows).repeat_interleave(each, 1) / each


def _passes(
    lab: Lab, prompt: StudiedPrompt, token_ids: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows that chose the ids, some at a time: hidden (L + 1, n, C), attention (L, H, n, T)."""
    language, length = lab.config.language, len(prompt.token_ids)
    keep = {"hidden": "all", "attention": "all", "rows": slice(length - 1, None)}
    state = lab.start(prompt, keep=keep)
    width = language.num_hidden_layers * language.num_attention_heads
    at_once = _SHARES_AT_ONCE // (width * (length + len(token_ids)))
    at_once = min(max(1, at_once), _IDS_AT_ONCE)
    for first in range(-at_once, len(token_ids) - 1, at_once):
        if first >= 0:
            state.step(torch.tensor([token_ids[first : min(first + at_once, len(token_ids) - 1)]]))
        assert state.hidden is not None
        assert state.attention is not None
        yield state.hidden[:, 0], state.attention[:, 0]


@dataclass(eq=False)
class _Seen:
    """What is kept of each pass."""

    lab: Lab
    spans: list[tuple[int, int]]
    places: Tensor
    bands: tuple[Band, ...]
    heat: list[Floats] = field(default_factory=list)
    looks: list[Floats] = field(default_factory=list)
    heads: list[Floats] = field(default_factory=list)
    maps: list[Floats] = field(default_factory=list)
    said: list[float] = field(default_factory=list)
    others: list[list[tuple[int, float]]] = field(default_factory=list)
    best: list[list[tuple[int, float]]] = field(default_factory=list)

    @classmethod
    def by(cls, lab: Lab, prompt: StudiedPrompt) -> _Seen:
        spans = [(each.start, each.start + each.num_rows) for each in prompt.image_spans]
        places = row_places(lab, prompt)
        return cls(lab, spans, places, bands_of(lab.config.language.num_hidden_layers))

    def add(self, hidden: Tensor, attention: Tensor, token_ids: Sequence[int]) -> None:
        """Of n rows: hidden (L + 1, n, C), attention (L, H, n, T)."""
        on_rows = [attention[..., first:stop] for first, stop in self.spans]
        looks = sum((each.sum(-1) for each in on_rows), attention.new_zeros(attention.shape[:-1]))
        self.looks.append(_array(looks.mean(1).T))
        self.heads.append(_array(looks.permute(2, 0, 1)))
        self.heat.append(self.heat_on(on_rows, attention))
        self.maps.append(_array(self._joined(attention.mean((0, 1)))))
        self._read(hidden, token_ids[len(self.said) : len(self.said) + hidden.shape[1]])

    def heat_on(self, on_rows: list[Tensor], attention: Tensor) -> Floats:
        """(G, n, N, P, P) of the shares (L, H, n, R) on each picture's rows."""
        side = self.lab.config.vision.image_size // self.lab.config.vision.patch_size
        shape = (len(self.bands), attention.shape[2], len(on_rows), side, side)
        if not on_rows:
            return numpy.zeros(shape, numpy.float32)
        heat = []
        for rows, places in zip(on_rows, self.places, strict=True):
            by_layer = rows.mean(1) @ places.to(rows.dtype)
            heat.append(torch.stack([by_layer[b.first : b.stop].mean(0) for b in self.bands]))
        return _array(torch.stack(heat, 2)).reshape(shape)

    def _joined(self, shares: Tensor) -> Tensor:
        """(n, T) → (n, M): the rows of a picture as one."""
        parts, last = [], 0
        for first, stop in self.spans:
            parts += [shares[:, last:first], shares[:, first:stop].sum(1, keepdim=True)]
            last = stop
        return torch.cat([*parts, shares[:, last:]], 1)

    def _read(self, hidden: Tensor, said: Sequence[int]) -> None:
        """A layer at a time: the logits of all would be large."""
        best: list[list[tuple[int, float]]] = [[] for _ in said]
        for rows in hidden:
            logs = self.lab.lens(rows).log_softmax(-1)
            for row, guess in zip(best, _likeliest(logs, 1), strict=True):
                row += guess
        self.best += best
        chosen = torch.tensor(said, device=logs.device)[:, None]
        self.said += logs.gather(1, chosen)[:, 0].tolist()
        self.others += _likeliest(logs, min(NUM_OTHERS, logs.shape[1]))


def _likeliest(logs: Tensor, count: int) -> list[list[tuple[int, float]]]:
    values, ids = logs.topk(count)
    return [
        list(zip(*each, strict=True)) for each in zip(ids.tolist(), values.tolist(), strict=True)
    ]


def _settled(
    best: Sequence[Sequence[tuple[int, float]]], token_ids: Sequence[int]
) -> Iterator[int | None]:
    for row, said in zip(best, token_ids, strict=True):
        others = [number for number, (token_id, _) in enumerate(row) if token_id != said]
        since = others[-1] + 1 if others else 0
        yield since if since < len(row) else None


def label(tokenizer: Tokenizer, token_id: int) -> str:
    """An id as it can be read alone: · for a space, ⏎ for a new line, others by their names."""
    if not 0 <= token_id < tokenizer.vocab_size:
        return f"#{token_id}"
    piece = tokenizer.piece_of(token_id)
    return "⏎" if piece == "<0x0A>" else piece.replace("\u2581", "·").replace("\n", "⏎")


def _columns(tokenizer: Tokenizer, prompt: StudiedPrompt) -> Iterator[str]:
    starts = {span.start: span.num_rows for span in prompt.image_spans}
    at, count = 0, 0
    while at < len(prompt.token_ids):
        if at in starts:
            count += 1
            yield "picture" if len(starts) == 1 else f"picture {count}"
            at += starts[at]
        else:
            yield label(tokenizer, prompt.token_ids[at])
            at += 1


def piece_texts(tokenizer: Tokenizer, prompt: StudiedPrompt, token_ids: Sequence[int]) -> list[str]:
    """What each id adds to the answer; nothing for a control id, or half a character."""
    before = tokenizer.encode_begun(prompt.begun)[0]
    stream = TextStream(tokenizer, before)
    texts = [stream.feed(token_id) for token_id in token_ids]
    texts[-1] += stream.flush()
    return texts


def words_of(texts: Sequence[str], answer: str) -> tuple[Word, ...]:
    """Pieces that are one word, and as the last word what stands behind the answer's text."""
    whole = "".join(texts)
    answer = answer.strip()
    end = max(0, whole.rfind(answer)) + len(answer) if answer else 0
    at, starts, ending = 0, [0], len(texts)
    for index, text in enumerate(texts):
        if at >= end:
            ending = index
            break
        stands_alone = text[:1].isalnum() and text[0] >= _FIRST_WITHOUT_SPACES
        if text.strip() and (text[0].isspace() or whole[at - 1 : at].isspace() or stands_alone):
            # A blank, and half a character, which adds no text, belong to what is behind them.
            while index and not texts[index - 1].strip():
                index -= 1
            # What is blank so far belongs to the first word.
            starts += [index] if whole[:at].strip() else []
        at += len(text)
    cuts = [start for start in starts if start < ending]
    words = [
        Word("".join(texts[first:stop]).strip(), first, stop)
        for first, stop in pairwise([*cuts, ending])
    ]
    return (*words, Word(END, ending, len(texts))) if ending < len(texts) else tuple(words)


def _even(parts: Sequence[Floats]) -> Floats:
    """Rows that see more and more, each as wide as the last."""
    width = parts[-1].shape[1]
    return numpy.concatenate(
        [numpy.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts]
    )


def _as_picture(pixels: Tensor) -> Image.Image:
    """(3, S, S) in 0…1 → RGB."""
    levels = (pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0)
    return Image.fromarray(levels.cpu().numpy())


def _array(values: Tensor) -> Floats:
    array: Floats = values.to(torch.float32).cpu().numpy()
    return array
