"""Lab: what a researcher asks of a model, one method each.

Owns   the way from prompts, pixels and answers to logits, kept layers, gradients and searches.
Takes  a LoadedModel; `MiniGPT4.lab` makes one.
Never  is used by two threads at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from minigpt4_runtime.checkpoint.blank_model import list_weights
from minigpt4_runtime.config import ModelConfig, SamplingParams
from minigpt4_runtime.errors import PromptTooLongError, RequestError
from minigpt4_runtime.images.pixels import open_rgb, resize
from minigpt4_runtime.lab.edits import edited
from minigpt4_runtime.lab.explaining import explain, look
from minigpt4_runtime.lab.explanation import Explanation, Look
from minigpt4_runtime.lab.hooks import Hook, Layers, Site
from minigpt4_runtime.lab.ids import read_ids
from minigpt4_runtime.lab.keep import Keep, KeepLike
from minigpt4_runtime.lab.modules import shared_modules, tuned_modules
from minigpt4_runtime.lab.opened import Opened
from minigpt4_runtime.lab.prompt import StudiedPrompt
from minigpt4_runtime.lab.searching import (
    Answer,
    Choose,
    Growing,
    Processor,
    greedy,
    search,
)
from minigpt4_runtime.lab.sight import Encoded, watching_queries
from minigpt4_runtime.lab.state import State
from minigpt4_runtime.loaded import LoadedModel
from minigpt4_runtime.messages import Message, image, read_messages
from minigpt4_runtime.report.files import write_whole
from minigpt4_runtime.text.answer import AnswerText
from minigpt4_runtime.text.prompt import find_template, read_raw, render

if TYPE_CHECKING:
    from minigpt4_runtime.messages import ImageLike
    from minigpt4_runtime.model.minigpt4 import MiniGPT4Model


@dataclass(frozen=True, eq=False)
class Outcome:
    """What `Lab.forward` gives for B sequences of T rows, the answer's among them.

    `logits` (B, T, V): row t's are of the id at t + 1. `hidden` and `attention` are what was kept
    (see `Keep`). `loss` is the mean of -log p over the answer's ids; None without one.
    """

    logits: Tensor
    hidden: Tensor | None
    attention: Tensor | None
    loss: Tensor | None


class Lab:
    """A loaded model, opened. Its modules are plain torch over the weights that the engine holds.

    `weights` are all of them by name, of a quantised matrix its parts, without gradients until
    `requires_grad_()` is called on one. Never write to one: the engine computes with it. `edited`
    is the way to try others.
    """

    def __init__(
        self, loaded: LoadedModel, untuned: MiniGPT4Model | None = None, adapter: int = 0
    ) -> None:
        """Raises a RequestError where several ranks share the model. The rest is for `under`."""
        self._loaded = loaded
        self._untuned = untuned or shared_modules(loaded)
        model = tuned_modules(self._untuned, loaded, adapter)
        self._opened = Opened(model, loaded.config, loaded.backend.device, adapter)
        self._shapes = {weight.name: weight.shape for weight in list_weights(model)}
        self._template = find_template(loaded.config.template)
        self.weights: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.config: ModelConfig = loaded.config
        self.device: torch.device = loaded.backend.device

    def under(self, adapter: str) -> Lab:
        """A laboratory of the same model with one of the adapters that requests choose from.

        Its LoRA is added to all rows, and is not among the `weights`.

        Raises:
            RequestError: there is no such adapter.
        """
        return Lab(self._loaded, self._untuned, self._loaded.find_adapter(adapter))

    def prompt(
        self, asked: str | Sequence[Message | Mapping[str, Any]], pictures: Sequence[ImageLike] = ()
    ) -> StudiedPrompt:
        """Messages as `MiniGPT4.chat` takes them, or a raw text with `<ImageHere>` for pictures.

        A raw text is taken as it is: no template, no system text. `<s>` and `</s>` in it are
        control ids, and a BOS id stands before it all.

        Raises:
            RequestError: places and pictures differ, or pictures are given beside messages.
            ImageError: a picture cannot be read.
        """
        if isinstance(asked, str):
            prompt = read_raw(asked, [image(each) for each in pictures])
        elif pictures:
            raise RequestError("Messages hold their pictures themselves: leave out pictures.")
        else:
            prompt = render(read_messages(asked), self._template)
        encoded, side = self._loaded.encode_prompt(prompt), self.config.vision.image_size
        empty = torch.empty(0, 3, side, side, device=self.device)
        pixels = torch.cat([empty, *(self.pixels(each) for each in prompt.images)])
        num_begun = len(self._loaded.tokenizer.encode_begun(prompt.begun)[0])
        return StudiedPrompt(
            encoded.token_ids, encoded.image_spans, len(encoded.token_ids) - num_begun,
            encoded.text, prompt.begun, pixels,
        )  # fmt: skip

    def pixels(self, picture: ImageLike) -> Tensor:
        """A picture as (1, 3, S, S) float32 in 0…1, resized as the model sees it.

        Raises:
            ImageError: it cannot be read.
        """
        rgb = open_rgb(image(picture), self._loaded.image_limits)
        levels = resize(rgb, self.config.vision.image_size).astype(numpy.float32)
        values = torch.from_numpy(levels / numpy.float32(255)).permute(2, 0, 1).contiguous()
        return values[None].to(self.device)

    @overload
    def encode(
        self, pixels: Tensor, *, exit_layer: int | None = ..., cross_attention: Literal[False] = ...
    ) -> Tensor: ...

    @overload
    def encode(
        self, pixels: Tensor, *, exit_layer: int | None = ..., cross_attention: Literal[True]
    ) -> Encoded: ...

    def encode(
        self, pixels: Tensor, *, exit_layer: int | None = None, cross_attention: bool = False
    ) -> Tensor | Encoded:
        """(N, 3, S, S) in 0…1 → (N, R, C) rows for the language model, with gradients to `pixels`.

        With an `exit_layer` the tower ends behind so many of its blocks. With `cross_attention` it
        also gives where each query of the Q-Former looked.

        Raises:
            RequestError: pixels have another shape, there is no such block, or no Q-Former.
        """
        with ExitStack() as stack:
            qformer = self._opened.model.vision.qformer
            shares = stack.enter_context(watching_queries(qformer)) if cross_attention else None
            embeddings = self._opened.encode(pixels, exit_layer)
        return embeddings if shares is None else Encoded(embeddings, torch.stack(shares))

    def forward(
        self,
        prompt: StudiedPrompt,
        pixels: Tensor | None = None,
        answer: str | Sequence[int] | Tensor = (),
        *,
        embeddings: Tensor | None = None,
        keep: KeepLike = (),
    ) -> Outcome:
        """Compute a prompt and a given answer at once: B sequences of T rows.

        `pixels` (B·N, 3, S, S) or `embeddings` (B·N, R, C) take the place of the prompt's pictures,
        and gradients flow to them and to weights that want one. The answer is a text, (A,) ids, or
        (B, A).
        """
        if pixels is not None and embeddings is not None:
            raise RequestError("Give pixels or embeddings, not both.")
        if pixels is not None:
            prompt = prompt.showing(pixels)
        elif embeddings is not None:
            prompt = prompt.reading(embeddings)
        rows, ids = self._opened.embed_prompt(prompt), self._answer_ids(answer)
        if len(ids) not in (1, len(rows)):
            raise RequestError(f"There are {len(ids)} answers for {len(rows)} sequences.")
        ids = ids.expand(len(rows), -1)
        if ids.shape[1]:
            rows = torch.cat([rows, self._opened.embed(ids)], 1)
        done = self._opened.run(rows, Keep.read(keep))
        logits = self._opened.logits(done.rows)
        loss = None
        if num_answer := ids.shape[1]:
            said = logits[:, -num_answer - 1 : -1]
            loss = functional.cross_entropy(said.flatten(0, 1), ids.flatten())
        return Outcome(logits, done.kept.hidden, done.kept.attention, loss)

    @torch.no_grad()
    def score(self, prompt: StudiedPrompt, candidates: Sequence[str | Sequence[int]]) -> Tensor:
        """The log-probability (K,) of each candidate answer; the prompt is computed once.

        A candidate is a text, or ids. Longer ones have more ids to be unlikely in: divide by their
        number to compare per id.

        Raises:
            RequestError: a candidate has no ids, or is several.
        """
        if isinstance(candidates, str):
            raise RequestError(f"candidates is {candidates!r:.80}; give a list of answers.")
        known = [self._one_answer(each) for each in candidates]
        if not all(map(len, known)):
            raise RequestError("A candidate is empty: give each at least one id or word.")
        if prompt.num_variants != 1:
            raise RequestError("score takes one picture for each place, not variants.")
        return self._opened.score(prompt, known)

    def lens(self, hidden: Tensor, *, norm: bool = True) -> Tensor:
        """The logits (…, V) of any layer's rows (…, C) through the final norm and the head.

        That is the logit lens (nostalgebraist, 2020). Without `norm` the head reads them as they
        are.
        """
        if norm:
            _, hidden = self._opened.model.language.norm(hidden)
        return self._opened.logits(hidden)

    def hook(self, site: Site, layers: Layers, function: Hook) -> AbstractContextManager[None]:
        """For a `with`: call `function(value, place)` at a site of these layers.

        What it returns takes the value's place; None lets it be. The sites and the shapes of their
        values: "scores" (B, H, Q, T), before mask and softmax; "heads" (B, Q, H, D); "attention",
        "feed_forward" and "residual" (B, Q, C).
        """
        return self._opened.hooks.adding(site, layers, function)

    def edited(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """For a `with`: compute with other weights, by their names, as whole matrices of floats.

        Gradients flow to what they were made of: `{name: lab.weights[name] + delta}`. The engine's
        stay as they are.

        Raises:
            RequestError: there is no such weight, or it has another shape.
        """
        return edited(self._opened.model, self._shapes, weights)

    def start(
        self, prompt: StudiedPrompt, beams: int = 1, *, keep: KeepLike = (), branch: str = ""
    ) -> State:
        """Compute a prompt, and let `beams` answers go on from it by ids of your choice.

        With B variants of its pictures there are B · beams answers, those of one variant together.
        `branch` is what hooks are told.
        """
        if beams < 1:
            raise RequestError(f"beams is {beams}; it must be at least 1.")
        keeps = Keep.read(keep)
        advance = partial(self._opened.advance, keep=keeps, branch=branch)
        with torch.no_grad():
            reached = self._opened.begin(prompt, keeps, branch)
        none = torch.empty(len(reached.logits), 0, dtype=torch.long, device=self.device)
        state = State(advance, reached, none)
        rows = [row for row in range(len(none)) for _ in range(beams)]
        return state if beams == 1 else state.fork(rows)

    def generate(
        self,
        prompt: StudiedPrompt,
        processors: Sequence[Processor] = (),
        *,
        branches: Mapping[str, StudiedPrompt] | None = None,
        keep: KeepLike = (),
        choose: Choose = greedy,
        max_new_tokens: int = 300,
        stop: tuple[str, ...] | None = None,
    ) -> list[Answer]:
        """Answer, with functions between the logits and the choice of each id.

        Processors are called in order, each with what the one before it made of the logits.
        `branches` are other prompts that get the same ids; processors see their logits by name. Of
        a prompt with B variants of its pictures there are B answers, else one. `stop` is that of
        `SamplingParams`.

        Raises:
            RequestError: a branch has another number of variants, or none of its own name.
            PromptTooLongError: a prompt leaves no room for an answer.
        """
        prompts = {"": prompt, **(branches or {})}
        if branches is not None and "" in branches:
            raise RequestError("A branch needs a name: '' is the prompt itself.")
        counts = {name: each.num_variants for name, each in prompts.items()}
        if len(set(counts.values())) > 1:
            raise RequestError(
                f"Branches and prompt differ in their numbers of variants: {counts}."
            )
        sampling = SamplingParams(max_new_tokens=max_new_tokens, stop=stop)
        longest, limit = max(len(p.token_ids) for p in prompts.values()), self.config.language
        room = limit.context_length - longest
        if room < 1:
            raise PromptTooLongError(longest, limit.context_length)
        states = {
            name: self.start(each, keep=() if name else keep, branch=name)
            for name, each in prompts.items()
        }
        texts = [self._answer_text(prompt, sampling) for _ in range(counts[""])]
        return search(
            states, texts, processors=processors, choose=choose,
            max_new_tokens=min(max_new_tokens, room), eos_id=self._loaded.tokenizer.eos_id,
        )  # fmt: skip

    def answer(self, prompt: StudiedPrompt, token_ids: Sequence[int]) -> Answer:
        """The text of an answer that a search of your own has found, as the engine would give it.

        Its `finish_reason` is "stop" if the ids hold an end, behind which none counts.

        Raises:
            RequestError: they are not the ids of one answer, or one is outside the vocabulary.
        """
        growing = Growing(
            self._answer_text(prompt, SamplingParams()), self._loaded.tokenizer.eos_id
        )
        for token_id in self._one_answer(token_ids).tolist():
            growing.feed(token_id)
        return growing.answer()

    def explain(
        self, prompt: StudiedPrompt, answer: str | Sequence[int] | None = None
    ) -> Explanation:
        """Where each word of an answer looked, what else was likely, and since which layer it was.

        Without an answer it is what `generate` gives. `as_page()` of the result is a page of its
        own, `showing(pictures)` puts others there than the model's own pixels. Attention is held
        for a few ids at a time. It says where a row has read, not why a word was chosen.

        Raises:
            RequestError: the answer has no ids, or is several; the prompt has variants of its
                pictures.
        """
        if answer is None:
            answer = self.generate(prompt)[0].token_ids
        ids = self._one_answer(answer).tolist()
        return explain(self, self._loaded.tokenizer, prompt, ids)

    def plot(
        self,
        prompt: StudiedPrompt,
        path: str | PathLike[str],
        answer: str | Sequence[int] | None = None,
    ) -> Explanation:
        """`explain`, and its page written to a file, which appears whole.

        Raises:
            RequestError: see `explain`.
            OSError: the file cannot be written.
        """
        explanation = self.explain(prompt, answer)
        write_whole(Path(path), explanation.as_page())
        return explanation

    def look(self, prompt: StudiedPrompt, answer: str, at: int) -> Look:
        """Where the word at a character of an answer looked: one pass over what is before it.

        Raises:
            RequestError: there is no such word, or the prompt has variants of its pictures.
        """
        return look(self, self._loaded.tokenizer, prompt, answer, at)

    def ids_of(self, text: str) -> tuple[int, ...]:
        """The ids of a text, as an answer would have them."""
        return tuple(self._loaded.tokenizer.encode(text))

    def text_of(self, token_ids: Sequence[int] | Tensor) -> str:
        """The text of ids; control ids are left out.

        Raises:
            RequestError: they are not the ids of one answer, or one is outside the vocabulary.
        """
        return self._loaded.tokenizer.decode(self._one_answer(token_ids).tolist())

    def _answer_ids(self, answer: str | Sequence[int] | Tensor) -> Tensor:
        """An answer → (1, A) or (B, A) ids."""
        given = self.ids_of(answer) if isinstance(answer, str) else answer
        ids = read_ids(given, self.config.language.vocab_size, self.device)
        return ids[None] if ids.dim() == 1 else ids

    def _one_answer(self, answer: str | Sequence[int] | Tensor) -> Tensor:
        """An answer → (A,) ids."""
        rows = self._answer_ids(answer)
        if len(rows) != 1:
            raise RequestError(
                f"These are the ids of {len(rows)} answers; give those of one, (A,)."
            )
        return rows[0]

    def _answer_text(self, prompt: StudiedPrompt, sampling: SamplingParams) -> AnswerText:
        before, space = self._loaded.tokenizer.encode_begun(prompt.begun)
        begins_with = None if not before or prompt.begun[-1].isspace() else space
        return AnswerText(
            self._loaded.tokenizer, self._template, sampling, before=before, begins_with=begins_with
        )
