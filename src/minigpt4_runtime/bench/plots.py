"""The plots of each kind of report.

Owns   what is drawn against what, and the captions.
Takes  a BenchReport; gives Charts.
Never  computes a number that is not in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from minigpt4_runtime.report.chart import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from minigpt4_runtime.bench.describe import DescribePoint
    from minigpt4_runtime.bench.language import BatchSearch, LanguagePoint
    from minigpt4_runtime.bench.report import BenchReport
    from minigpt4_runtime.bench.vision import VisionPoint
    from minigpt4_runtime.report.page import Chart


def draw_plots(report: BenchReport) -> list[Chart]:
    """All plots that the report's points allow."""
    painters = {
        "bench vision": _draw_vision,
        "bench language": _draw_language,
        "bench describe": _draw_describe,
    }
    return painters[report.kind](report)


# --- vision ---------------------------------------------------------------------------------


def _draw_vision(report: BenchReport) -> list[Chart]:
    points: list[VisionPoint] = [each.point for each in report.measured]
    warm = [point for point in points if point.start == "warm"]
    cold = [point for point in points if point.start == "cold"]
    charts = [draw("A cold start: loading, and the first picture.", lambda axes: _cold(axes, cold))]
    if warm:
        charts += [
            draw("Where the time of a picture goes.", lambda axes: _stack_stages(axes, warm)),
            draw("Pictures a second, by batch size.", lambda axes: _images_per_second(axes, warm)),
        ]
    if warm and report.ceilings is not None:
        ceiling = report.ceilings.gigaflops_per_second
        charts.append(
            draw(
                "Operations a second in tower and projection; the line is the best matrix product "
                "of this run.",
                lambda axes: _gigaflops(axes, warm, ceiling),
            )
        )
    return charts


def _cold(axes: Axes, points: Sequence[VisionPoint]) -> None:
    labels, loads = [p.runtime for p in points], [p.load_ms or 0.0 for p in points]
    axes.barh(labels, loads, label="loading")
    axes.barh(labels, [p.latency_ms for p in points], left=loads, label="first picture")
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _stack_stages(axes: Axes, points: Sequence[VisionPoint]) -> None:
    labels = [f"{p.runtime}, batch {p.batch_size}" for p in points]
    # What a compiled graph does as one is drawn as one.
    stages: dict[str, list[float]] = {
        "decode": [p.decode_ms for p in points],
        "preprocess": [p.preprocess_ms for p in points],
        "tower": [p.tower_ms or 0.0 for p in points],
        "projection": [p.projection_ms or 0.0 for p in points],
        "tower and projection": [p.encode_ms if p.tower_ms is None else 0.0 for p in points],
    }
    left = [0.0] * len(points)
    for name, widths in stages.items():
        if any(widths):
            axes.barh(labels, widths, left=left, label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms for one picture")
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _images_per_second(axes: Axes, points: Sequence[VisionPoint]) -> None:
    for name, own in _grouped(points, lambda p: p.runtime).items():
        _by_size(axes, own, "batch_size", "images_per_second", label=name)
    _label(axes, "batch size", "pictures a second")


def _gigaflops(axes: Axes, points: Sequence[VisionPoint], ceiling: float) -> None:
    for name, own in _grouped(points, lambda p: p.runtime).items():
        _by_size(axes, own, "batch_size", "gigaflops_per_second", label=name)
    axes.axhline(ceiling, linestyle="--", color="grey", label="ceiling")
    _label(axes, "batch size", "GFLOP/s")


# --- language -------------------------------------------------------------------------------


def _draw_language(report: BenchReport) -> list[Chart]:
    points: list[LanguagePoint] = [
        each.point for each in report.measured if each.point.failure is None
    ]
    charts = [
        draw(_search_caption(each), partial(_search, result=each))
        for each in report.searches
        if any(tried.verdict != "memory" for tried in each.found.tried.values())
    ]
    if points:
        charts.append(
            draw(
                "Tokens a second, by batch size: all of the time, and while all answers grow.",
                lambda axes: _tokens_per_second(axes, points),
            )
        )
    fast = [point for point in points if point.bandwidth_share is not None]
    if fast:
        charts.append(
            draw(
                "How much of the measured memory bandwidth a later token uses.",
                lambda axes: _bandwidth(axes, fast),
            )
        )
    if not report.searches and points:
        charts.append(
            draw("The time of a response.", lambda axes: _response(axes, points)),
        )
    return charts


def _search_caption(result: BatchSearch) -> str:
    return f"The search for the largest batch. {result.as_text()}"


def _search(axes: Axes, result: BatchSearch) -> None:
    tried = sorted(result.found.tried.items())
    shown = [(size, t.point.per_token_ms, t.verdict) for size, t in tried if t.point.per_token_ms]
    axes.plot([s for s, _, _ in shown], [ms for _, ms, _ in shown], color="grey", linewidth=1)
    for verdict, colour, marker in (("holds", "C2", "o"), ("latency", "C5", "X")):
        own = [(size, ms) for size, ms, each in shown if each == verdict]
        name = "holds" if verdict == "holds" else "too slow"
        if own:
            axes.plot(*zip(*own, strict=True), color=colour, marker=marker, ls="", label=name)
    for number, size in enumerate(size for size, t in tried if t.verdict == "memory"):
        axes.axvline(size, color="C3", ls=":", label=None if number else "out of memory")
    axes.axhline(result.max_token_latency_ms, linestyle="--", color="grey", label="limit")
    _scale_sizes(axes, [size for size, _ in tried])
    _label(axes, "batch size", "ms for a later token (mean)")


def _tokens_per_second(axes: Axes, points: Sequence[LanguagePoint]) -> None:
    lengths = _grouped(points, lambda p: f"{p.input_length} + {p.output_length}")
    for number, (name, own) in enumerate(lengths.items()):
        colour = f"C{number}"
        _by_size(axes, own, "batch_size", "tokens_per_second", label=name, color=colour)
        if own[0].output_length > 1:
            decode = {"label": f"{name}, decode only", "color": colour, "linestyle": ":"}
            # Hollow: a single batch size has no line that would tell the two apart.
            decode["markerfacecolor"] = "none"
            _by_size(axes, own, "batch_size", "decode_tokens_per_second", **decode)
    _label(axes, "batch size", "tokens a second")


def _bandwidth(axes: Axes, points: Sequence[LanguagePoint]) -> None:
    points = sorted(points, key=lambda p: (p.input_length, p.output_length, p.batch_size))
    labels = [f"{p.batch_size} × {p.input_length} + {p.output_length}" for p in points]
    axes.barh(labels, [100 * (p.bandwidth_share or 0.0) for p in points])
    axes.invert_yaxis()
    axes.set_xlabel("% of the measured bandwidth")
    axes.set_ylabel("batch × input + output")


def _response(axes: Axes, points: Sequence[LanguagePoint]) -> None:
    points = sorted(points, key=lambda p: (p.input_length, p.output_length, p.batch_size))
    labels = [f"{p.batch_size} × {p.input_length} + {p.output_length}" for p in points]
    first = [p.first_token_ms or 0.0 for p in points]
    rest = [(p.response_time_ms or 0.0) - ms for p, ms in zip(points, first, strict=True)]
    axes.barh(labels, first, label="until the first token")
    axes.barh(labels, rest, left=first, label="until the last")
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_ylabel("batch × input + output")
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


# --- describe -------------------------------------------------------------------------------


def _draw_describe(report: BenchReport) -> list[Chart]:
    points: list[DescribePoint] = [
        each.point for each in report.measured if each.point.ms_per_image is not None
    ]
    if not points:
        return []
    return [
        draw("What one picture costs as the folder grows.", lambda axes: _cost(axes, points)),
        draw("Tokens a second as the folder grows.", lambda axes: _folder_tokens(axes, points)),
    ]


def _cost(axes: Axes, points: Sequence[DescribePoint]) -> None:
    _by_size(axes, points, "num_images", "ms_per_image")
    _label(axes, "pictures", "ms for one picture")


def _folder_tokens(axes: Axes, points: Sequence[DescribePoint]) -> None:
    _by_size(axes, points, "num_images", "tokens_per_second")
    _label(axes, "pictures", "tokens a second")


# --- shared ---------------------------------------------------------------------------------


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
    """Doublings at equal distances, and a number at each."""
    axes.set_xscale("log", base=2)
    powers = range(min(sizes).bit_length() - 1, max(sizes).bit_length())
    axes.set_xticks([2**power for power in powers])
    axes.xaxis.set_major_formatter("{x:g}")


def _label(axes: Axes, x: str, y: str) -> None:
    """Name both axes; whatever is measured here begins at 0."""
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
