"""Write docs/cli.md from the command line itself; a test checks that it is current.

python scripts/write_cli_docs.py
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from minigpt4_runtime.cli.chat import HELP
from minigpt4_runtime.cli.main import app

DOCS_PATH = Path(__file__).parents[1] / "docs" / "cli.md"
WHAT_CAN_BE_TYPED = {"minigpt4 chat": HELP}
TYPER_S_OWN = ("install_completion", "show_completion", "help")
HEAD = """\
# The command line

Made by `scripts/write_cli_docs.py`; edit the commands in `src/minigpt4_runtime/cli/` instead.

Answers go to stdout, everything else to stderr. `minigpt4 --install-completion` teaches your shell
to complete commands and options.

| exit status | meaning |
|---|---|
| 0 | all went well |
| 1 | an error, which stderr tells in one line `error: …`, or a picture that failed |
| 2 | wrong usage |
| 3 | `export vision --format om`: the ONNX file is made, and the .om is not, for want of `atc` |
| 130 | stopped by Ctrl-C |
"""


def write_docs() -> str:
    """The whole page."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    return "\n".join([HEAD, *_sections("minigpt4", group)])


def _sections(name: str, command: Any) -> Iterator[str]:
    """A command's section, then those of the commands in it."""
    yield _section(name, command)
    for inner, each in getattr(command, "commands", {}).items():
        if not each.hidden:
            yield from _sections(f"{name} {inner}", each)


def _section(name: str, command: Any) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [
        each
        for each in command.params
        if each.param_type_name == "option" and each.name not in TYPER_S_OWN
    ]
    usage = " ".join([name, *map(_usage, arguments), "[OPTIONS]"])
    if hasattr(command, "commands"):
        usage = f"{name} {'[OPTIONS] ' if options else ''}COMMAND …"
    lines = [f"## {name}", "", f"`{usage}`", "", command.help.strip()]
    if name in WHAT_CAN_BE_TYPED:
        lines += ["", "```", WHAT_CAN_BE_TYPED[name], "```"]
    if arguments or options:
        lines += ["", "| | | default |", "|---|---|---|"]
    lines += [f"| `{_metavar(each)}` | {_escape(each.help)} | |" for each in arguments]
    lines += [f"| {_names(each)} | {_escape(each.help)} | {_default(each)} |" for each in options]
    return "\n".join([*lines, ""])


def _metavar(parameter: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    choices = parameter.type_descriptor.choices or ()
    return "\\|".join(choices)


def _usage(argument: Any) -> str:
    text = _metavar(argument) + ("…" if argument.nargs == -1 else "")
    return text if argument.required else f"[{text}]"


def _names(option: Any) -> str:
    value = "" if option.is_flag else f" {_metavar(option)}"
    return ", ".join(f"`{name}{value if name.startswith('--') else ''}`" for name in option.opts)


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.is_flag or option.default is None:
        return ""
    return f"`{option.default}`"


def _escape(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


if __name__ == "__main__":
    DOCS_PATH.write_text(write_docs(), encoding="utf-8", newline="\n")
