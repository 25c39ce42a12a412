"""Plots as SVG, one for a light page and one for a dark page.

Owns   the size, the colours and the fonts of plots.
Takes  a function that draws on axes; gives a Chart for a page.
Never  uses pyplot, whose state is global.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.optional import require
from minigpt4_runtime.report.page import Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

matplotlib = require("matplotlib", extra="eval")
figure = require("matplotlib.figure", extra="eval")
cycler = require("cycler", extra="eval")

# Okabe and Ito's colours, which are distinct for colour-blind people.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler.cycler(color=COLOURS),
    "legend.frameon": False,
    "svg.fonttype": "none",  # Text stays text: small, sharp, and in any script.
    "svg.hashsalt": "minigpt4",  # The same numbers give the same bytes.
    "text.parse_math": False,  # A $ in a name is a $.
}
_LIGHT, _DARK = "#333333", "#dddddd"
_INCHES = (5.2, 3.1)  # Narrow, so that letters stay readable on a phone.


def draw(caption: str, paint: Callable[[Axes], object]) -> Chart:
    """Draw for light and for dark pages. The caption is also the text for screen readers."""
    return Chart(caption, light=_svg_url(paint, _LIGHT), dark=_svg_url(paint, _DARK))


def _svg_url(paint: Callable[[Axes], object], ink: str) -> str:
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    file = io.BytesIO()
    with matplotlib.rc_context({**_STYLE, **dict.fromkeys(inks, ink)}), warnings.catch_warnings():
        # A browser has fonts for the letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        canvas = figure.Figure(figsize=_INCHES, layout="constrained")
        paint(canvas.add_subplot())
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
