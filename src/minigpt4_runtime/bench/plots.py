"""The plots of each kind of run.

Owns   the axes and captions of the plots.
Takes  a BenchRun; gives Charts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.report.chart import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from minigpt4_runtime.bench.describe import DescribePoint
    from minigpt4_runtime.bench.language import BatchSearch, LanguagePoint
    from minigpt4_runtime.bench.report import BenchRun
    from minigpt4_runtime.bench.vision import VisionPoint
    from minigpt4_runtime.report.page import Chart

# A caption, what draws it, and the points to draw.
Plot = tuple[str, Callable[[Sequence[Any], "Axes"], object], Sequence[Any]]


def draw_plots(run: BenchRun) -> list[Chart]:
    """All plots that the run's points allow."""
    plots = {
        "bench vision": _vision_plots,
        "bench language": _language_plots,
        "bench describe": _describe_plots,
    }[run.kind](run)
    return [draw(caption, partial(paint, points)) for caption, paint, points in plots if points]


# --- vision ---------------------------------------------------------------------------------


def _vision_plots(run: BenchRun) -> list[Plot]:
    points: list[VisionPoint] = [each.point for each in run.measured]
    warm = [point for point in points if point.start == "warm"]
    cold = [point for point in points if point.start == "cold"]
    ceiling = run.ceilings.gigaflops_per_second if run.ceilings else None
    rates = partial(_by_runtime, name="images_per_second", y="pictures a second")
    flops = partial(_by_runtime, name="gigaflops_per_second", y="GFLOP/s", ceiling=ceiling)
    caption = "Operations a second in tower and projection; the line is the best matrix product"
    return [
        ("A cold start: loading, and the first picture.", _cold, cold),
        ("Where the time of a picture goes.", _stages, warm),
        ("Pictures a second, by batch size.", rates, warm),
        (f"{caption} of this run.", flops, warm),
    ]


def _cold(points: Sequence[VisionPoint], axes: Axes) -> None:
    parts = {
        "loading": [p.load_ms or 0.0 for p in points],
        "first picture": [p.latency_ms for p in points],
    }
    _stack(axes, [p.runtime for p in points], parts, "ms")


def _stages(points: Sequence[VisionPoint], axes: Axes) -> None:
    labels = [f"{p.runtime}, batch {p.batch_size}" for p in points]
    # A compiled graph computes tower and projection as one.
    parts = {
        "decode": [p.decode_ms for p in points],
        "preprocess": [p.preprocess_ms for p in points],
        "tower": [p.tower_ms or 0.0 for p in points],
        "projection": [p.projection_ms or 0.0 for p in points],
        "tower and projection": [p.encode_ms if p.tower_ms is None else 0.0 for p in points],
    }
    _stack(axes, labels, parts, "ms for one picture")


def _by_runtime(
    points: Sequence[VisionPoint], axes: Axes, *, name: str, y: str, ceiling: float | None = None
) -> None:
    for runtime, own in _grouped(points, lambda p: p.runtime).items():
        _by_size(axes, own, "batch_size", name, label=runtime)
    if ceiling is not None:
        axes.axhline(ceiling, linestyle="--", color="grey", label="ceiling")
    _label(axes, "batch size", y)


# --- language -------------------------------------------------------------------------------


def _language_plots(run: BenchRun) -> list[Plot]:
    points: list[LanguagePoint] = sorted(
        (each.point for each in run.measured if each.point.failure is None),
        key=lambda p: (p.input_length, p.output_length, p.batch_size),
    )
    fast = [point for point in points if point.bandwidth_share is not None]
    return [
        *(
            (f"The search for the largest batch. {each.as_text()}", _search, [each])
            for each in run.searches
            if any(tried.verdict != "memory" for tried in each.found.tried.values())
        ),
        (
            "Tokens a second, by batch size: all of the time, and while all answers grow.",
            _tokens_per_second,
            points,
        ),
        ("How much of the measured memory bandwidth a later token uses.", _bandwidth, fast),
        ("The time of a response.", _response, [] if run.searches else points),
    ]


def _search(searches: Sequence[BatchSearch], axes: Axes) -> None:
    (result,) = searches
    tried = sorted(result.found.tried.items())
    shown = [(size, t.point.per_token_ms, t.verdict) for size, t in tried if t.point.per_token_ms]
    axes.plot([s for s, _, _ in shown], [ms for _, ms, _ in shown], color="grey", linewidth=1)
    for verdict, name, colour, marker in (
        ("holds", "holds", "C2", "o"),
        ("latency", "too slow", "C5", "X"),
    ):
        own = [(size, ms) for size, ms, each in shown if each == verdict]
        if own:
            axes.plot(*zip(*own, strict=True), color=colour, marker=marker, ls="", label=name)
    for number, size in enumerate(size for size, t in tried if t.verdict == "memory"):
        axes.axvline(size, color="C3", ls=":", label=None if number else "out of memory")
    axes.axhline(result.max_token_latency_ms, linestyle="--", color="grey", label="limit")
    _scale_sizes(axes, [size for size, _ in tried])
    _label(axes, "batch size", "ms for a later token (mean)")


def _tokens_per_second(points: Sequence[LanguagePoint], axes: Axes) -> None:
    lengths = _grouped(points, lambda p: f"{p.input_length} + {p.output_length}")
    for number, (name, own) in enumerate(lengths.items()):
        colour = f"C{number}"
        _by_size(axes, own, "batch_size", "tokens_per_second", label=name, color=colour)
        if own[0].output_length > 1:
            decode = {"label": f"{name}, decode only", "color": colour, "linestyle": ":"}
            # Hollow markers: with one batch size there is no line to tell the two apart.
            decode["markerfacecolor"] = "none"
            _by_size(axes, own, "batch_size", "decode_tokens_per_second", **decode)
    _label(axes, "batch size", "tokens a second")


def _bandwidth(points: Sequence[LanguagePoint], axes: Axes) -> None:
    shares = [100 * (p.bandwidth_share or 0.0) for p in points]
    _stack(axes, _works(points), {"": shares}, "% of the measured bandwidth")
    axes.set_ylabel("batch × input + output")


def _response(points: Sequence[LanguagePoint], axes: Axes) -> None:
    first = [p.first_token_ms or 0.0 for p in points]
    whole = [p.response_time_ms or 0.0 for p in points]
    rest = [ms - until for ms, until in zip(whole, first, strict=True)]
    parts = {"until the first token": first, "until the last": rest}
    _stack(axes, _works(points), parts, "ms")
    axes.set_ylabel("batch × input + output")


def _works(points: Sequence[LanguagePoint]) -> list[str]:
    return [f"{p.batch_size} × {p.input_length} + {p.output_length}" for p in points]


# --- describe -------------------------------------------------------------------------------


def _describe_plots(run: BenchRun) -> list[Plot]:
    points = [each.point for each in run.measured if each.point.ms_per_image is not None]
    cost = partial(_by_folder, name="ms_per_image", y="ms for one picture")
    rate = partial(_by_folder, name="tokens_per_second", y="tokens a second")
    return [
        ("What one picture costs as the folder grows.", cost, points),
        ("Tokens a second as the folder grows.", rate, points),
    ]


def _by_folder(points: Sequence[DescribePoint], axes: Axes, *, name: str, y: str) -> None:
    _by_size(axes, points, "num_images", name)
    _label(axes, "pictures", y)


# --- shared ---------------------------------------------------------------------------------


def _stack(axes: Axes, labels: Sequence[str], parts: Mapping[str, Sequence[float]], x: str) -> None:
    """A bar for each label, its parts end to end. Parts that are 0 everywhere are left out."""
    left = [0.0] * len(labels)
    for name, widths in parts.items():
        if any(widths):
            axes.barh(labels, widths, left=left, label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(x)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _grouped(points: Sequence[Any], key: Callable[[Any], str]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    return groups


def _by_size(axes: Axes, points: Sequence[Any], size: str, name: str, **style: Any) -> None:
    """A line of the points' field `name` over their field `size`."""
    ordered = sorted(points, key=lambda point: getattr(point, size))
    sizes = [getattr(point, size) for point in ordered]
    axes.plot(sizes, [getattr(point, name) for point in ordered], marker="o", **style)
    _scale_sizes(axes, sizes)


def _scale_sizes(axes: Axes, sizes: Sequence[int]) -> None:
    """A logarithmic axis with a tick at each power of two."""
    axes.set_xscale("log", base=2)
    powers = range(min(sizes).bit_length() - 1, max(sizes).bit_length())
    axes.set_xticks([2**power for power in powers])
    axes.xaxis.set_major_formatter("{x:g}")


def _label(axes: Axes, x: str, y: str) -> None:
    """Name both axes, and let y begin at 0."""
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
