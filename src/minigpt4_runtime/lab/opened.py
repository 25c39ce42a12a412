"""A model in plain torch at work for the laboratory: from pixels and ids to logits.

Owns   the way from a prompt to rows, from rows through a pass to logits, and the hooks on it.
Takes  `shared_modules` of a loaded model, prompts and ids; gives tensors.
Never  reads a text, or chooses an id.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.lab.attention import Past
from minigpt4_runtime.lab.hooks import Hooks
from minigpt4_runtime.lab.keep import Keep
from minigpt4_runtime.lab.passes import Pass, run_pass
from minigpt4_runtime.lab.prompt import StudiedPrompt
from minigpt4_runtime.lab.sight import left_early, normalise
from minigpt4_runtime.lab.state import Reached
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model

CANDIDATES_AT_ONCE = 16


class Opened:
    """The modules, the functions that are hooked into them, and what both compute."""

    def __init__(
        self, model: MiniGPT4Model, config: ModelConfig, device: torch.device, adapter: int = 0
    ) -> None:
        self.model, self.config, self.device, self.adapter = model, config, device, adapter
        self.hooks = Hooks(len(model.language.layers))

    def encode(self, pixels: Tensor, exit_layer: int | None = None) -> Tensor:
        """See `Lab.encode`: (N, 3, S, S) → (N, R, C)."""
        vision = self.model.vision
        with left_early(vision, exit_layer):
            normed = normalise(pixels, self.config.vision)
            embeddings: Tensor = vision(normed.to(self.device, vision.ln_vision.weight.dtype))
        return embeddings

    def embed(self, ids: Tensor) -> Tensor:
        """(B, n) ids → (B, n, C) rows."""
        return self.model.language.embed(ids.flatten()).view(*ids.shape, -1)

    def embed_prompt(self, prompt: StudiedPrompt) -> Tensor:
        """A prompt → (B, T, C) rows, with gradients to its pixels or image rows."""
        num_variants = prompt.num_variants
        ids = torch.tensor(prompt.token_ids, device=self.device)
        words = self.embed(ids[None].expand(num_variants, -1))
        if not prompt.image_spans:
            return words
        given = prompt.embeddings
        shown = self.encode(prompt.pixels) if given is None else given.to(self.device)
        wanted = (self.config.rows_per_image, self.config.language.hidden_size)
        if tuple(shown.shape[1:]) != wanted:
            raise RequestError(
                f"embeddings are {tuple(shown.shape)}; this model takes (N, {wanted[0]}, "
                f"{wanted[1]}), as lab.encode gives them."
            )
        shown = shown.to(words.dtype).view(num_variants, -1, *wanted)
        parts, last = [], 0
        for index, span in enumerate(prompt.image_spans):
            parts += [words[:, last : span.start], shown[:, index]]
            last = span.start + span.num_rows
        return torch.cat([*parts, words[:, last:]], 1)

    def run(
        self, embeddings: Tensor, keep: Keep, *, past: Past | None = None, branch: str = ""
    ) -> Pass:
        """See `run_pass`."""
        return run_pass(
            self.model.language, embeddings, hooks=self.hooks, keep=keep, past=past, branch=branch,
            adapter=self.adapter,
        )  # fmt: skip

    def begin(self, prompt: StudiedPrompt, keep: Keep, branch: str) -> Reached:
        """Where a prompt leads."""
        return self._reach(self.embed_prompt(prompt), Past(), keep, branch)

    def advance(self, ids: Tensor, past: Past, *, keep: Keep, branch: str) -> Reached:
        """Where (B, n) ids behind a past lead. See `Advance`."""
        return self._reach(self.embed(ids), past, keep, branch)

    def _reach(self, embeddings: Tensor, past: Past, keep: Keep, branch: str) -> Reached:
        done = self.run(embeddings, keep, past=past, branch=branch)
        return Reached(self.logits(done.rows[:, -1]), done.kept, done.past)

    def logits(self, rows: Tensor) -> Tensor:
        """(…, C) normed rows → (…, V), at least float32."""
        logits: Tensor = self.model.language.head(rows)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def score(self, prompt: StudiedPrompt, candidates: Sequence[Tensor]) -> Tensor:
        """The log-probabilities (K,) of ids behind a prompt, some candidates at a time."""
        begun = self.begin(prompt, Keep(), "")
        scores = [
            self._score_some(begun, candidates[first : first + CANDIDATES_AT_ONCE])
            for first in range(0, len(candidates), CANDIDATES_AT_ONCE)
        ]
        return torch.cat(scores) if scores else begun.logits.new_empty(0)

    def _score_some(self, begun: Reached, candidates: Sequence[Tensor]) -> Tensor:
        """Side by side, shorter ones filled up: what stands behind an id does not change it."""
        ids = nn.utils.rnn.pad_sequence(list(candidates), batch_first=True)
        logits = begun.logits.expand(len(ids), 1, -1)
        if ids.shape[1] > 1:
            past = begun.past.select([0] * len(ids))
            done = self.run(self.embed(ids[:, :-1]), Keep(), past=past)
            logits = torch.cat([logits, self.logits(done.rows)], 1)
        said = logits.log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0]
        lengths = torch.tensor([len(each) for each in candidates], device=ids.device)
        is_real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return said.masked_fill(~is_real, 0).sum(1)
