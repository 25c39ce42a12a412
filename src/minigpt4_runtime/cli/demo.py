"""`minigpt4 demo`: the demo model on a drawn scene, or judged on many."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from minigpt4_runtime.cli.options import ModelOptions, flag, option, spread_options
from minigpt4_runtime.cli.terminal import note, progress_bar
from minigpt4_runtime.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from minigpt4_runtime.api import MiniGPT4

DEFAULT_SCENES = 500


@spread_options
def demo(
    *,
    check: Annotated[
        bool,
        flag(
            "Draw many scenes held out of training and print how many answers are exactly right.",
            "--check",
        ),
    ] = False,
    num_scenes: Annotated[
        int, option("COUNT", "With --check: how many.", "--scenes", min=1)
    ] = DEFAULT_SCENES,
    as_json: Annotated[
        bool, flag("With --check: print JSON, with every mistake.", "--json")
    ] = False,
    seed: Annotated[
        int | None,
        option(
            "NUMBER",
            "Draw the same scenes again. Without it --check takes 0, "
            "and a single scene is new each time.",
        ),
    ] = None,
    save: Annotated[
        Path | None,
        option("FILE", "Keep the drawn picture: FILE.png or FILE.jpg."),
    ] = None,
    where: ModelOptions,
) -> None:
    """Ask the demo model about a drawn scene, or judge it on many.

    Questions and answers go to stdout. An answer that is not exactly right is followed by the
    right one. A model that writes boxes is asked a question of each of MiniGPT-v2's tasks.
    """
    if check:
        if save is not None:
            raise ConfigError("--save keeps the picture of a single scene; leave out --check.")
        _check(where.load(announce_demo=False), num_scenes, seed or 0, as_json=as_json)
    elif as_json or num_scenes != DEFAULT_SCENES:
        raise ConfigError("--scenes and --json belong to --check. Add it, or leave them out.")
    else:
        _show_one(where, seed, save)


def _check(model: MiniGPT4, num_scenes: int, seed: int, *, as_json: bool) -> None:
    from minigpt4_runtime.evaluation import demo_check

    with progress_bar(num_scenes) as bar:
        report = demo_check.check(model, num_scenes=num_scenes, seed=seed, on_scene=bar.advance)
    if as_json:
        print(json.dumps(report.as_mapping(), indent=2, ensure_ascii=False))
    else:
        print(report.as_table())


def _show_one(where: ModelOptions, seed: int | None, save: Path | None) -> None:
    from minigpt4_runtime.evaluation.demo_cases import draw_case

    seed = random.randrange(10**6) if seed is None else seed
    model = where.load(announce_demo=False)
    case = draw_case(random.Random(seed), with_boxes=model.has_boxes)
    if save is not None:
        _save(case.image, save)
    note(f"A scene held out of training; --seed {seed} draws it again.")
    for verdict in case.talk(model):
        task = f"[{verdict.task}] " if verdict.task else ""
        print(f"> {task}{verdict.question}\n{verdict.given}", flush=True)
        if not verdict.is_right:
            print(f"  (right would be: {verdict.expected})", flush=True)


def _save(image: Image, path: Path) -> None:
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"--save is {path}; its name must end with .png or .jpg.")
    try:
        with path.open("xb") as file:
            image.save(file, "PNG" if path.suffix.lower() == ".png" else "JPEG")
    except FileExistsError:
        raise ConfigError(f"--save is {path}, which exists. Give another name.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}).") from None
    note(f"The picture is in {path}.")
