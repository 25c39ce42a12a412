"""The loss of answers under a model that learns.

Owns   the join of a batch: words, projected pictures, and the answers that are to be said.
Takes  Examples and features; gives losses whose gradients flow to what learns.
Never  changes a weight: that is the optimiser's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from minigpt4_runtime.checkpoint.load import load_language
from minigpt4_runtime.lab.modules import PlainOperations
from minigpt4_runtime.model.causal import packed_attention
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.tune.data import Example
from minigpt4_runtime.tune.frozen import divided_kernel, frozen_kernel
from minigpt4_runtime.tune.image_end import ImageEnd, load_image_end
from minigpt4_runtime.tune.lora import LearnedAdapter, adapt
from minigpt4_runtime.tune.settings import TuneSettings
from minigpt4_runtime.tune.together import Processes


@dataclass(frozen=True, eq=False)
class Learner:
    """A frozen language model, and what learns around it, in float32.

    `image_end` makes the rows of pictures; `adapters` add to products of the language model, by the
    names of their matrices.
    """

    language: Llama
    image_end: ImageEnd
    adapters: Mapping[str, LearnedAdapter]

    @classmethod
    def load(
        cls,
        model_dir: Path,
        settings: TuneSettings,
        *,
        device: torch.device,
        dtype: torch.dtype,
        processes: Processes | None = None,
    ) -> Self:
        """As a training begins. The language model computes in `dtype`, its weights as stored.

        With `settings.divide` each of the `processes` holds its share of them.
        """
        language = load_language(
            model_dir, device=device, dtype=dtype, operations=PlainOperations(),
            kernel_of=partial(divided_kernel, processes)
            if settings.divide and processes else frozen_kernel,
        )  # fmt: skip
        image_end = load_image_end(
            model_dir,
            with_qformer=settings.train == "qformer",
            drawn_by=settings.seed if settings.fresh else None,
        )
        image_end.requires_grad_(settings.train != "none").to(device)
        learner = cls(language, image_end, adapt(language, settings, device))
        if settings.recompute:
            learner.recompute()
        return learner

    @cached_property
    def learned(self) -> dict[str, nn.Parameter]:
        """All that learns, by the names that it has, or would have, in the model."""
        found = {f"vision.{name}": each for name, each in self.image_end.named_parameters()}
        for owner, adapter in self.adapters.items():
            for name, each in adapter.named_parameters():
                found[f"language.{owner}.adapter.{name}"] = each
        return {name: each for name, each in found.items() if each.requires_grad}

    def recompute(self) -> None:
        """From now on compute each layer again on the way back (Chen et al., 2016).

        The gradients are the same; only what a layer was given stays in memory.
        """
        for layer in self.language.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def losses(self, examples: Sequence[Example], features: Tensor) -> tuple[Tensor, int]:
        """The sum of -log p over all ids of the answers, and how many rows were computed.

        `features` (P, …) are those of all pictures. Sequences lie one behind the other in one row,
        each with positions of its own, and none sees another: nothing is filled up.
        """
        device = self.image_end.projection.weight.device
        whole = [torch.tensor((*each.prompt_ids, *each.answer_ids)) for each in examples]
        lengths = [len(each) for each in whole]
        starts = [0, *accumulate(lengths)]
        ids = torch.cat(whole).to(device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        words = self.language.embed(ids)
        places, shown = self._shown(examples, features, starts)
        rows = words.index_copy(0, places.to(device), shown.to(words.dtype))
        hidden = self.language(rows, positions, packed_attention(lengths))
        said = _answer_places(examples, starts).to(device)
        logits = self.language.logits(hidden[said - 1])
        return functional.cross_entropy(logits, ids[said], reduction="sum"), starts[-1]

    def _shown(
        self, examples: Sequence[Example], features: Tensor, starts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Where the rows of pictures stand in the packed batch, and these rows."""
        numbers = [number for each in examples for number in each.pictures]
        first = [
            start + place
            for start, each in zip(starts, examples, strict=False)
            for place in each.places
        ]
        shown: Tensor = self.image_end(
            features[numbers].to(self.image_end.projection.weight.device)
        )
        at = torch.tensor(first, dtype=torch.long)[:, None] + torch.arange(shown.shape[1])
        return at.flatten(), shown.flatten(0, 1)


def _answer_places(examples: Sequence[Example], starts: Sequence[int]) -> Tensor:
    """Where each id of the answers stands in the packed batch; the row before it has to say it."""
    return torch.tensor([
        start + len(each.prompt_ids) + offset
        for start, each in zip(starts, examples, strict=False)
        for offset in range(len(each.answer_ids))
    ])  # fmt: skip
