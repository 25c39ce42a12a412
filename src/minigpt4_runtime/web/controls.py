"""The controls beside the dialogue: how answers are chosen.

Owns   their order, ranges and words.
Takes  what they send; gives Settings.
Never  asks anything.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minigpt4_runtime.optional import require
from minigpt4_runtime.web.dialogue import INSTALL, DialogueError, Settings

gradio = require("gradio", install=INSTALL)

_MAX_SEED = 2**63 - 1


def add_controls() -> list[Any]:
    """Show the controls, in the order of Settings' fields."""
    default = Settings()
    return [
        gradio.Textbox(
            default.system, label="System text", placeholder="The model's own", lines=1,
            max_lines=6, elem_id="system",
        ),
        gradio.Slider(
            0, 2, default.temperature, step=0.05, label="Temperature",
            info="0 takes the likeliest.", elem_id="temperature",
        ),
        gradio.Slider(0.05, 1, default.top_p, step=0.05, label="Top-p", elem_id="top_p"),
        gradio.Slider(
            0, 200, default.top_k, step=1, label="Top-k", info="0 sets no limit.", elem_id="top_k"
        ),
        gradio.Slider(
            1, 10, default.num_beams, step=1, label="Beams",
            info="Temperature 0 only.", elem_id="num_beams",
        ),
        gradio.Slider(
            0.5, 2, default.repetition_penalty, step=0.05, label="Repetition penalty",
            info="1 is none.", elem_id="repetition_penalty",
        ),
        gradio.Slider(
            1, 1000, default.max_tokens, step=1, label="Longest answer", info="In tokens.",
            elem_id="max_tokens",
        ),
        # A box of text: Gradio's box of numbers sends 0 where nothing was typed.
        gradio.Textbox(
            label="Seed", placeholder="A new one each time", max_lines=1, elem_id="seed",
            info="The same seed draws the same answer.",
        ),
    ]  # fmt: skip


def read_controls(*values: Any) -> Settings:
    """What the controls say.

    Raises:
        DialogueError: the seed is no whole number, or too large.
    """
    *others, seed = values
    return replace(Settings(*others), seed=_read_seed(seed or ""))


def _read_seed(text: str) -> int | None:
    digits = text.strip()
    if not digits:
        return None
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 19 or int(digits) > _MAX_SEED:
        raise DialogueError(
            f"The seed is {digits[:40]!r}; it must be a whole number from 0 to {_MAX_SEED}. Leave "
            "it empty for a new draw each time."
        )
    return int(digits)
