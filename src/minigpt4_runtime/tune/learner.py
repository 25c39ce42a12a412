"""The loss of answers under a projection that learns.

Owns   the join of a batch: words, projected pictures, and the answers that are to be said.
Takes  Examples and features; gives losses whose gradients flow to the projection alone.
Never  changes a weight: that is the optimiser's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from minigpt4_runtime.checkpoint.load import load_language
from minigpt4_runtime.lab.hooks import Hooks
from minigpt4_runtime.lab.keep import Keep
from minigpt4_runtime.lab.modules import PlainOperations
from minigpt4_runtime.lab.passes import run_pass
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.tune.data import Example


@dataclass(frozen=True, eq=False)
class Learner:
    """A frozen language model behind a projection: `weight` (C, W) and `bias` (C) in float32."""

    language: Llama
    weight: nn.Parameter
    bias: nn.Parameter

    @classmethod
    def load(
        cls, model_dir: Path, projection: tuple[Tensor, Tensor], *, device: torch.device,
        dtype: torch.dtype,
    ) -> Self:  # fmt: skip
        """With the language model of a folder, through its formats' plain products."""
        language = load_language(
            model_dir, device=device, dtype=dtype, operations=PlainOperations()
        )
        weight, bias = (nn.Parameter(each.to(device)) for each in projection)
        return cls(language, weight, bias)

    def recompute(self) -> None:
        """From now on compute each layer again on the way back (Chen et al., 2016).

        The gradients are the same; only what a layer was given stays in memory.
        """
        for layer in self.language.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def losses(self, examples: Sequence[Example], features: Tensor) -> tuple[Tensor, int]:
        """The sum of -log p over all ids of the answers, and how many rows were computed.

        `features` (P, R, W) are those of all pictures. Shorter sequences are filled up behind their
        end, which changes nothing before it: attention is causal.
        """
        device = self.weight.device
        whole = [torch.tensor((*each.prompt_ids, *each.answer_ids)) for each in examples]
        ids = nn.utils.rnn.pad_sequence(whole, batch_first=True).to(device)
        num_sequences, length = ids.shape
        words = self.language.embed(ids.flatten())
        rows = words.index_copy(0, *self._shown(examples, features, length, words.dtype))
        done = run_pass(
            self.language, rows.view(num_sequences, length, -1),
            hooks=Hooks(len(self.language.layers)), keep=Keep(),
        )  # fmt: skip
        saying, said = _answer_places(examples, length)
        logits = self.language.logits(done.rows.flatten(0, 1)[saying.to(device)])
        loss = functional.cross_entropy(logits, ids.flatten()[said.to(device)], reduction="sum")
        return loss, sum(map(len, whole))

    def _shown(
        self, examples: Sequence[Example], features: Tensor, length: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Where the rows of pictures stand in the packed batch, and these rows."""
        numbers = [number for each in examples for number in each.pictures]
        starts = [
            index * length + place for index, each in enumerate(examples) for place in each.places
        ]
        shown = functional.linear(features[numbers].to(self.weight.device), self.weight, self.bias)
        at = torch.tensor(starts)[:, None] + torch.arange(features.shape[1])
        return at.flatten().to(self.weight.device), shown.flatten(0, 1).to(dtype)


def _answer_places(examples: Sequence[Example], length: int) -> tuple[Tensor, Tensor]:
    """Of each answer's id, the row that has to say it and its own place, in the packed batch."""
    said = [
        index * length + len(each.prompt_ids) + offset
        for index, each in enumerate(examples)
        for offset in range(len(each.answer_ids))
    ]
    places = torch.tensor(said)
    return places - 1, places


def draw_projection(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """A projection (out, in) at random, as torch begins one: ±1/√in, evenly."""
    generator = torch.Generator().manual_seed(seed)
    bound = shape[1] ** -0.5
    weight = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return weight, torch.empty(shape[0]).uniform_(-bound, bound, generator=generator)
