"""The settings of the rows that need more than their largest logit, as tensors.

Owns   the way from SamplingParams, answers and guides to tensors on one device; the keys of lots.
Takes  Wants, those that are drawn first; gives RowSettings.
Never  sees a logit or waits for a device: tensors are sent from pinned memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt4_runtime.cache.sending import send
from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.engine.drawing import Limits, where
from minigpt4_runtime.engine.sequence import Branch, Sequence
from minigpt4_runtime.kernels.contracts import Lots

# Ids, none twice, and a float32 value for each.
_Adjustment = tuple[Collection[int], Tensor]


@dataclass(frozen=True)
class Want:
    """A row of the logits, the branch that it belongs to, and the (V,) ids its guide allows."""

    row: int
    sequence: Sequence
    branch: Branch
    allowed: NDArray[numpy.bool_] | None

    @property
    def params(self) -> SamplingParams:
        """Its sampling settings."""
        return self.sequence.request.sampling


class Spots(NamedTuple):
    """Single logits by row and id, none twice, and a value for each: all (t,)."""

    rows: Tensor
    ids: Tensor
    values: Tensor


@dataclass(frozen=True)
class RowSettings:
    """The settings of n rows, of which the first are drawn. None: no row has that setting.

    Rows are counted among the n, but for `rows`, which says where they are among all logits.
    """

    rows: Tensor  # (n,)
    bias: Spots | None
    repetition: Spots | None
    said: Spots | None  # The penalties of presence and frequency.
    guide: Limits | None
    unfinished: Tensor | None  # The rows that must not end yet.
    lots: Lots | None
    num_drawn: int
    reported: Tensor | None  # The rows whose logprobs are wanted.
    num_top: int  # The most logprobs that one of them wants.


def row_settings(
    wants: Many[Want], *, bos_id: int, vocab_size: int, device: torch.device
) -> RowSettings:
    """The settings of all rows, on their way to the device."""
    drawn = [each for each in wants if each.params.temperature > 0]
    logprobs = [each.params.logprobs for each in wants]
    return RowSettings(
        rows=send(torch.tensor([each.row for each in wants]), device),
        bias=_spots(map(_bias, wants), device),
        repetition=_spots((_repetition(each, bos_id) for each in wants), device),
        said=_spots(map(_said, wants), device),
        guide=_guides(wants, device),
        unfinished=where([len(w.branch.answer) < w.params.min_new_tokens for w in wants], device),
        lots=Lots(tuple(each.params for each in drawn), tuple(lot_of(w.sequence) for w in drawn))
        if drawn
        else None,
        num_drawn=len(drawn),
        reported=where([count is not None for count in logprobs], device),
        num_top=min(max((count or 0 for count in logprobs), default=0), vocab_size),
    )


def lot_of(sequence: Sequence) -> int:
    """The key of the next token's random numbers: by the request's seed and the token's number."""
    lot = hashlib.blake2b(f"{sequence.seed}/{len(sequence.branches[0].answer)}".encode())
    return int.from_bytes(lot.digest()[:8], "little", signed=True)


def _guides(wants: Many[Want], device: torch.device) -> Limits | None:
    rows = where([each.allowed is not None for each in wants], device)
    if rows is None:
        return None
    allowed = numpy.stack([each.allowed for each in wants if each.allowed is not None])
    return Limits(rows, send(torch.from_numpy(allowed), device))


def _bias(want: Want) -> _Adjustment | None:
    biases = dict(want.params.logit_bias)
    return (biases, torch.tensor(list(biases.values()), dtype=torch.float32)) if biases else None


def _repetition(want: Want, bos_id: int) -> _Adjustment | None:
    # After Keskar et al., 2019. The original generates from embeddings: only a leading BOS counts
    # as seen, no prompt.
    penalty = want.params.repetition_penalty
    seen = {bos_id, *want.branch.answer}
    return (seen, torch.full((len(seen),), penalty)) if penalty != 1.0 else None


def _said(want: Want) -> _Adjustment | None:
    presence, frequency = want.params.presence_penalty, want.params.frequency_penalty
    if not (presence or frequency):
        return None
    said = Counter(want.branch.answer)
    return said, presence + frequency * torch.tensor(list(said.values()))


def _spots(changes: Iterable[_Adjustment | None], device: torch.device) -> Spots | None:
    found = [(row, *change) for row, change in enumerate(changes) if change is not None]
    counts = [len(ids) for _, ids, _ in found]
    if not any(counts):
        return None
    rows = torch.tensor([row for row, _, _ in found]).repeat_interleave(torch.tensor(counts))
    ids = numpy.fromiter(chain.from_iterable(ids for _, ids, _ in found), numpy.int64)
    values = torch.cat([values for _, _, values in found])
    return Spots(*(send(each, device) for each in (rows, torch.from_numpy(ids), values)))
