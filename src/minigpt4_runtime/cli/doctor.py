"""`minigpt4 doctor`: what this machine can run, and what is missing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4_runtime.cli.fetch import EXAMPLE_PATH
from minigpt4_runtime.cli.options import flag

if TYPE_CHECKING:
    from minigpt4_runtime.hub.diagnosis import Diagnosis, Fit


def doctor(
    *,
    as_json: Annotated[bool, flag("Print JSON instead of lines.", "--json")] = False,
) -> None:
    """Say what this machine can run, and what to install for the rest.

    Checks Python, packages, devices, memory, extras and the cache, and describes one picture. The
    exit status is 1 if this machine cannot describe a picture.
    """
    from minigpt4_runtime.hub.diagnosis import diagnose

    diagnosis = diagnose(_describe_example)
    if as_json:
        print(json.dumps(diagnosis.as_mapping(), indent=2))
    else:
        _print_lines(diagnosis)
    if not diagnosis.can_run:
        raise typer.Exit(1)


def _describe_example() -> str:
    from minigpt4_runtime.api import MiniGPT4

    return MiniGPT4.load().describe(EXAMPLE_PATH).text


def _print_lines(diagnosis: Diagnosis) -> None:
    from minigpt4_runtime.checkpoint.weights import show_bytes

    for check in diagnosis.checks:
        mark = "ok  " if check.is_well else "FAIL" if check.is_needed else "note"
        # `seen` may be a sentence with a full stop, such as an error.
        rest = check.seen if check.is_well else f"{check.seen.removesuffix('.')}. {check.todo}"
        print(f"{mark}  {check.name}: {rest}")
    print("\nDevices")
    for device in diagnosis.devices:
        free = "free memory unknown" if device.free_bytes is None else show_bytes(device.free_bytes)
        print(f"      {device.name}: {free} free, default dtype {device.default_dtype}")
    print("\nWhat fits (weights, and keys and values of one full context; room with --cache-dtype)")
    for fit in diagnosis.fits:
        needed = show_bytes(fit.needed_bytes)
        held = "" if fit.weights == "float" else f" as {fit.weights}"
        kept = [
            f"{count:,} tokens in {name}" for name, count in (fit.tokens or {}).items() if count
        ]
        room = f"; room for {', '.join(kept)}" if kept else ""
        print(f"{_mark(fit)}  {fit.preset}{held} in {fit.dtype}: {needed}, on {fit.device}{room}")
    print("\nExtras")
    for extra in diagnosis.extras:
        mark, rest = ("no  ", f": {extra.install}") if extra.missing else ("ok  ", "")
        print(f"{mark}  {extra.name}{rest}")
    print(f"\n{'Pictures can be described.' if diagnosis.can_run else 'Something is missing.'}")


def _mark(fit: Fit) -> str:
    return "?   " if fit.fits is None else "ok  " if fit.fits else "no  "
