"""`--recipe`: a published run's way to ask, for the commands that ask.

Owns   the option, and the note that says what is taken from a recipe and what differs.
Takes  a recipe's name and what is typed beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from minigpt4_runtime.cli.options import option
from minigpt4_runtime.cli.terminal import note

if TYPE_CHECKING:
    from minigpt4_runtime.evaluation.recipe import Run

RecipeName = Annotated[
    str | None,
    option(
        "NAME",
        "Ask, decode and cut as a published run did: opera, pai, halc, vlmevalkit, or the path of "
        "a .toml in their form. An option that is given a value of its own counts in the recipe's "
        "stead. What differs from the published run is named.",
        "--recipe",
    ),
]


def take(
    recipe: str | None, task: str, *, typed: Run, usual: Run, more: tuple[str, ...] = ()
) -> Run:
    """The recipe's run of a task with what is typed in its stead; without a recipe what is typed.

    `usual` are the options' defaults: an option of that value does not count as typed. `more` are
    further differences from the published run.
    """
    if recipe is None:
        return typed
    from minigpt4_runtime.evaluation.recipe import Recipe

    read = Recipe.read(recipe)
    run, changed = read.run(task).altered(typed, usual)
    differs = [*run.differs, *more]
    if changed:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        differs.append(f"{options} as given here")
    told = f"As {read.name} does it ({read.source})."
    if differs:
        told += f" This differs from the published run: {'; '.join(differs)}."
    note(told)
    return replace(run, told=told)
