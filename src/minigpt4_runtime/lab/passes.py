"""One pass of the language model over rows, with what is kept, changed and gone on from.

Owns   the binding of hooks, dense attention and kept layers to `Llama.forward`.
Takes  rows of B sequences and their past; gives a `Pass`.
Never  chooses a token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minigpt4_runtime.errors import PromptTooLongError
from minigpt4_runtime.lab.attention import DenseAttention, Past
from minigpt4_runtime.lab.hooks import Hooks
from minigpt4_runtime.lab.keep import Keep, Kept
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.row_operations import Residual


@dataclass(frozen=True)
class Pass:
    """What a pass over Q rows gives: (B, Q, C) rows behind the final norm, and the rest."""

    rows: Tensor
    kept: Kept
    past: Past


def run_pass(
    language: Llama,
    embeddings: Tensor,
    *,
    hooks: Hooks,
    keep: Keep,
    past: Past | None = None,
    branch: str = "",
    adapter: int = 0,
) -> Pass:
    """Compute (B, Q, C) rows that stand behind their past. Without one no keys are held to go on.

    `adapter` is the number of the one that all rows choose, 0 for none.

    Raises:
        PromptTooLongError: positions do not reach so far.
    """
    start = past.length if past else 0
    num_sequences, num_rows, _ = embeddings.shape
    stop, limit = start + num_rows, language.config.context_length
    if stop > limit:
        raise PromptTooLongError(stop, limit)
    kept = Kept(
        keep, num_layers=len(language.layers), num_heads=language.config.num_attention_heads,
        start=start, stop=stop,
    )  # fmt: skip
    attend = DenseAttention(
        past, num_sequences=num_sequences, hooks=hooks, kept=kept, branch=branch
    )
    positions = torch.arange(start, stop, device=embeddings.device).repeat(num_sequences)
    kept.take_hidden(0, embeddings)
    with ExitStack() as stack:
        stack.enter_context(hooks.watching(language, num_rows, start, branch))
        # Behind the functions of users: kept is what goes on.
        for number, layer in enumerate(language.layers, start=1):
            if kept.wants_hidden(number):
                keeps = _keeper(kept, number, num_rows)
                stack.callback(layer.register_forward_hook(keeps).remove)
        chosen = torch.full_like(positions, adapter) if adapter else None
        rows = language(embeddings.flatten(0, 1), positions, attend, chosen)
    return Pass(rows.view(embeddings.shape), kept, attend.past)


def _keeper(kept: Kept, number: int, num_rows: int) -> Callable[..., None]:
    def keep(_: nn.Module, __: object, behind: Residual) -> None:
        packed = behind.total
        kept.take_hidden(number, packed.view(-1, num_rows, packed.shape[-1]))

    return keep
