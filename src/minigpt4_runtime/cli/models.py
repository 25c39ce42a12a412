"""`minigpt4 models`: the models in the cache."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from minigpt4_runtime.cli.options import flag
from minigpt4_runtime.cli.terminal import note


def models(
    *,
    delete: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Delete this model; `downloads` is what fetches left behind."
        ),
    ] = None,
    as_json: Annotated[bool, flag("Print JSON instead of lines.", "--json")] = False,
) -> None:
    """List the models that `minigpt4 fetch` has made, or delete one.

    They stand in the cache: MINIGPT4_HOME, or minigpt4 in your user's folder for caches.
    """
    from minigpt4_runtime.checkpoint import shelf
    from minigpt4_runtime.checkpoint.weights import show_bytes

    if delete is not None:
        note(f"{delete} is deleted: {show_bytes(_delete(delete))} are free again.")
        return
    found, downloads_bytes = shelf.list_models(), shelf.measure(shelf.downloads_dir())
    if as_json:
        cache = {"home": shelf.home_dir(), "models": list(map(asdict, found))}
        print(json.dumps({**cache, "downloads_bytes": downloads_bytes}, indent=2, default=str))
        return
    for each in found:
        print(f"{each.name}\t{show_bytes(each.num_bytes)}\t{each.path}")
    if downloads_bytes:
        note(f"Downloads that are kept: {show_bytes(downloads_bytes)} in {shelf.downloads_dir()}")
    if not found:
        note(f"No models in {shelf.models_dir()} yet. Get one: minigpt4 fetch vicuna-7b")


def _delete(name: str) -> int:
    """Delete a model or the downloads, which are locked while a fetch writes them."""
    from minigpt4_runtime.checkpoint import shelf

    if name != shelf.DOWNLOADS or not shelf.downloads_dir().is_dir():
        return shelf.delete(name)
    from minigpt4_runtime.hub.fetch import cache_lock

    with cache_lock():
        return shelf.delete(name)
