"""The controls beside the dialogue, for the choice of answers.

Owns   their order, ranges and words.
Takes  their values; gives AnswerSettings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minigpt4_runtime.config import SAMPLING_RANGES, SamplingParams
from minigpt4_runtime.optional import require
from minigpt4_runtime.web.dialogue import AnswerSettings, DialogueError

gradio = require("gradio", extra="web")


def add_controls() -> list[Any]:
    """Show the controls, in the order of AnswerSettings' fields."""
    default = AnswerSettings()
    return [
        gradio.Dropdown(
            [], label="Model", visible=False, elem_id="model",
            info="The server's own, or with one of its adapters.",
        ),
        gradio.Textbox(
            default.system, label="System text", placeholder="The model's own", lines=1,
            max_lines=6, elem_id="system",
        ),
        _slider("temperature", "Temperature", high=2, info="0 takes the likeliest."),
        _slider("top_p", "Top-p", low=0.05),
        _slider("top_k", "Top-k", high=200, info="0 sets no limit."),
        _slider("num_beams", "Beams", high=10, info="Temperature 0 only."),
        _slider("repetition_penalty", "Repetition penalty", low=0.5, high=2, info="1 is none."),
        _slider("max_new_tokens", "Longest answer", high=1000, info="In tokens."),
        # A text box: Gradio's number box sends 0 if it is empty.
        gradio.Textbox(
            label="Seed", placeholder="A new one each time", max_lines=1, elem_id="seed",
            info="The same seed draws the same answer.",
        ),
    ]  # fmt: skip


def _slider(
    setting: str,
    label: str,
    *,
    low: float | None = None,
    high: float | None = None,
    info: str | None = None,
) -> Any:
    """A slider over a setting's range, or over the part of it that people use."""
    allowed = SAMPLING_RANGES[setting]
    return gradio.Slider(
        allowed.low if low is None else low,
        allowed.high if high is None else high,
        getattr(SamplingParams, setting),
        step=1 if allowed.kind is int else 0.05, label=label, info=info,
        elem_id=setting.replace("max_new_tokens", "max_tokens"),
    )  # fmt: skip


def read_controls(*values: Any) -> AnswerSettings:
    """Read the values of the controls.

    Raises:
        DialogueError: the seed is no whole number, or too large.
    """
    model, *others, seed = values
    return replace(AnswerSettings(model or "", *others), seed=_read_seed(seed or ""))


def _read_seed(text: str) -> int | None:
    digits, allowed = text.strip(), SAMPLING_RANGES["seed"]
    if not digits:
        return None
    is_number = digits.isascii() and digits.isdecimal() and len(digits) <= len(str(allowed.high))
    if not is_number or int(digits) > (allowed.high or 0):
        raise DialogueError(
            f"The seed is {digits[:40]!r}; it must be {allowed}. Leave it empty for a new draw "
            "each time."
        )
    return int(digits)
