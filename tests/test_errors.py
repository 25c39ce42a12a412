"""The drawn tree of errors is the real one."""

import inspect
import re

import pytest

from minigpt4_runtime import errors

DRAWN = re.compile(r"(?P<branch>(?:│   |    |├── |└── )*)(?P<name>\w+Error)\b(?P<words>.*)")
CLASSES = {
    name: cls
    for name, cls in inspect.getmembers(errors, inspect.isclass)
    if cls.__module__ == errors.__name__
}


def drawn_tree(text: str) -> dict[str, str | None]:
    """Class name → name of the class it hangs from, read from lines such as `│   ├── Name`."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in text.splitlines():
        if drawn := DRAWN.match(line):
            depth = len(drawn["branch"]) // 4
            path[depth:] = [drawn["name"]]
            parents[drawn["name"]] = path[depth - 1] if depth else None
    return parents


def test_reading_a_drawn_tree() -> None:
    text = (
        "RootError\n├── AError   words\n│   └── BError\n└── CError\n    └── DError\n\nOther words."
    )
    assert drawn_tree(text) == {
        "RootError": None,
        "AError": "RootError",
        "BError": "AError",
        "CError": "RootError",
        "DError": "CError",
    }


def test_drawn_tree_equals_the_class_tree() -> None:
    real = {
        name: cls.__bases__[0].__name__ if cls is not errors.MiniGPT4Error else None
        for name, cls in CLASSES.items()
    }
    assert drawn_tree(inspect.getdoc(errors) or "") == real


def test_the_root_is_a_plain_exception() -> None:
    assert errors.MiniGPT4Error.__bases__ == (Exception,)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_every_error_says_what_it_means(cls: type) -> None:
    assert issubclass(cls, errors.MiniGPT4Error)
    assert cls.__doc__ is not None
    assert cls.__doc__.strip()


def test_prompt_too_long_says_both_numbers() -> None:
    error = errors.PromptTooLongError(num_tokens=4100, limit=4096)
    assert (error.num_tokens, error.limit) == (4100, 4096)
    assert "4100" in str(error)
    assert "4096" in str(error)
