"""Which room may import which: the table of ARCHITECTURE.md, held against every module.

A room is a module or a folder directly under the package. An import of any kind counts: at the
top, inside a function, under TYPE_CHECKING, and a name written as text ("package.room:Class").
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import pytest

PACKAGE = "minigpt4_runtime"
SOURCE_DIR = Path(__file__).parents[1] / "src" / PACKAGE

# The package's own __init__ is a room too: the front door, with the public names.
FRONT_DOOR = "__init__"
# Words may be imported everywhere; the version is one of them.
WORDS = {
    "errors", "rope_scaling", "config", "presets", "messages", "new_folder", "optional",
    "__init__.__version__",
}  # fmt: skip
# All that one loaded model is made of.
BELOW_API = WORDS | {
    "text", "images", "formats", "model", "checkpoint", "cache", "kernels", "devices", "vision",
    "engine",
}  # fmt: skip

# An entry allows a room, one of its modules or one of its names, and what lies within them.
# Every room may import itself.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "rope_scaling": {"errors"},
    "config": {"errors", "rope_scaling"},
    "presets": {"errors", "config"},
    "messages": {"errors"},
    "new_folder": set(),
    "optional": {"errors"},
    "text": WORDS,
    "images": WORDS,
    "grammar": WORDS | {"text.tokenizer"},
    "formats": WORDS,
    "model": WORDS | {"formats"},
    "checkpoint": WORDS | {"formats", "model", "cache.sizes"},
    "convert": WORDS | {"text.tokenizer", "formats", "model", "checkpoint"},
    "quantise": WORDS | {"text", "images", "batch.finding", "formats", "model", "checkpoint"},
    "cache": WORDS,
    "kernels": WORDS | {"formats", "model", "cache"},
    "devices": WORDS | {"model.parallel"},
    "vision": WORDS | {"model", "devices.contracts"},
    "engine": WORDS
    | {"model", "cache", "kernels.contracts", "devices.contracts", "vision.contracts"},
    "rank_model": BELOW_API - {"text", "images"},
    "ranks": BELOW_API - {"text", "images"} | {"rank_model"},
    "report": WORDS,
    "loaded": BELOW_API | {"grammar", "ranks", "rank_model"},
    "probe": BELOW_API | {"loaded"},
    "reply": WORDS | {"text", "engine"},
    "steering": WORDS | {"text", "engine", "loaded"},
    "lab": WORDS | {"text", "images", "model", "checkpoint", "vision", "loaded", "report"},
    "tune": WORDS
    | {"text", "images", "formats", "model", "checkpoint"}
    | {"devices.group", "engine", "ranks", "lab", "report"},
    "batch": WORDS | {"images", "engine", "report"},
    "cluster": WORDS | {"api", FRONT_DOOR, "images", "batch", "report"},
    "api": BELOW_API
    | {"loaded", "probe", "reply", "steering", "lab", "batch"}
    | {"convert.fine_tune"},
    FRONT_DOOR: WORDS | {"api", "ranks.follow"},
    # Whether a model fits is asked of the devices themselves.
    "hub": WORDS
    | {"formats", "checkpoint", "convert", "quantise.choice", "kernels.native", "devices.registry"},
    "export": WORDS | {"images", "formats", "model", "checkpoint", "convert.key_map"},
    "vllm_plugin": WORDS | {"text", "images", "checkpoint", "export.language"},
    "server": WORDS | {"api", FRONT_DOOR, "images.fetch"},
    "web": WORDS | {"api", FRONT_DOOR},
    "bench": WORDS | {"api", FRONT_DOOR, "report", "cache.sizes"},
    "evaluation": WORDS | {"api", FRONT_DOOR, "images", "report"},
    "cli": WORDS
    | {"api", FRONT_DOOR, "server", "web", "export", "bench", "evaluation", "checkpoint", "convert"}
    | {
        "hub",
        "batch",
        "cluster",
        "images",
        "quantise",
        "tune",
        "formats.registry",
        "text.prompt.DESCRIBE_PROMPT",
        "report",
    },
    "__main__": {"cli.main.run"},
    "assets": set(),
}

# Within one room: no device knows another.
DEVICES = {"devices.cpu", "devices.cuda", "devices.npu"}

# Rooms that need nothing but Python, and rooms that load without torch.
ONLY_STANDARD_LIBRARY = {
    "errors", "rope_scaling", "config", "presets", "messages", "new_folder", "optional",
}  # fmt: skip
NO_TORCH_ON_LOAD = ONLY_STANDARD_LIBRARY | {
    "text", "grammar", "images", "formats", "batch", "cluster", "hub", "cli", FRONT_DOOR,
}  # fmt: skip
HEAVY = {"torch", "torch_npu"}

NAMES_THAT_SAY_NOTHING = {"utils", "common", "helpers", "core"}
MAX_DEPTH = 2

_NAME_AS_TEXT = re.compile(rf"{PACKAGE}(\.\w+)+(:\w+)?")


@dataclass(frozen=True)
class Import:
    """One imported name, as `package.module.name`, and when it is imported."""

    name: str
    line: int
    when: Literal["load", "call", "typing"]


class _ImportCollector(ast.NodeVisitor):
    def __init__(self, path: PurePosixPath) -> None:
        self.package_parts = (PACKAGE, *path.parent.parts)
        self.when: Literal["load", "call", "typing"] = "load"
        self.found: list[Import] = []

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [Import(alias.name, node.lineno, self.when) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        source = node.module or ""
        if node.level:
            above = self.package_parts[: len(self.package_parts) - node.level + 1]
            source = ".".join((*above, source) if source else above)
        self.found += [
            Import(f"{source}.{alias.name}", node.lineno, self.when) for alias in node.names
        ]

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and _NAME_AS_TEXT.fullmatch(node.value):
            self.found.append(Import(node.value.replace(":", "."), node.lineno, "call"))

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self._visit_all(node.body, "typing")
            self._visit_all(node.orelse, self.when)
        else:
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_all(list(ast.iter_child_nodes(node)), "call")

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_all(list(ast.iter_child_nodes(node)), "call")

    def _visit_all(
        self, nodes: list[ast.stmt] | list[ast.AST], when: Literal["load", "call", "typing"]
    ) -> None:
        before, self.when = self.when, when
        for node in nodes:
            self.visit(node)
        self.when = before


def collect_imports(path: PurePosixPath, tree: ast.Module) -> list[Import]:
    collector = _ImportCollector(path)
    collector.visit(tree)
    return collector.found


def room_of(path: PurePosixPath) -> str:
    return path.parts[0].removesuffix(".py")


def is_allowed(room: str, name: str) -> bool:
    """Whether `room` may import `name`, given from below the package: "engine.engine.Engine"."""
    if name.split(".")[0] not in MAY_IMPORT:
        name = f"{FRONT_DOOR}.{name}"
    return any(f"{name}.".startswith(f"{entry}.") for entry in MAY_IMPORT[room] | {room})


def room_faults(path: PurePosixPath, imports: list[Import]) -> Iterator[str]:
    room, module = room_of(path), ".".join(path.with_suffix("").parts)
    if room not in MAY_IMPORT:
        yield f"{path}: {room!r} is no room of the table"
        return
    for found in imports:
        outer, _, name = found.name.partition(".")
        if outer == PACKAGE and not is_allowed(room, name):
            yield f"{path}:{found.line}: {room} may not import {name or 'the package as a whole'}"
        elif module in DEVICES and outer == PACKAGE and ".".join(name.split(".")[:2]) in DEVICES:
            yield f"{path}:{found.line}: {module} may not import another device, {name}"


def third_party_faults(path: PurePosixPath, imports: list[Import]) -> Iterator[str]:
    room = room_of(path)
    for found in imports:
        outer = found.name.split(".")[0]
        if room in NO_TORCH_ON_LOAD and outer in HEAVY and found.when == "load":
            yield f"{path}:{found.line}: {room} must load without {outer}"
        elif (
            room in ONLY_STANDARD_LIBRARY
            and found.when != "typing"
            and outer != PACKAGE
            and outer not in sys.stdlib_module_names
        ):
            yield f"{path}:{found.line}: {room} may import only the standard library, not {outer}"


def form_faults(path: PurePosixPath, tree: ast.Module) -> Iterator[str]:
    if len(path.parts) > MAX_DEPTH:
        yield f"{path}: deeper than {MAX_DEPTH} levels"
    for part in path.parts:
        if part.removesuffix(".py") in NAMES_THAT_SAY_NOTHING:
            yield f"{path}: {part} is a name that says nothing"
    if not ast.get_docstring(tree):
        yield f"{path}: no docstring says what this module owns"


def find_faults(path: PurePosixPath, source: str) -> list[str]:
    """Everything wrong with one module; `path` is relative to the package."""
    tree = ast.parse(source)
    imports = collect_imports(path, tree)
    return [
        *room_faults(path, imports),
        *third_party_faults(path, imports),
        *form_faults(path, tree),
    ]


def read_room_table(text: str) -> dict[str, set[str]]:
    """The table of ARCHITECTURE.md: each room, and what it may import beside the words."""
    table: dict[str, set[str]] = {}
    for line in text.partition("\n| room |")[2].partition("\n\n")[0].splitlines()[2:]:
        room, _, cell, _ = (part.strip() for part in line.strip("|").split("|"))
        found: set[str] = set()
        for entry in filter(None, re.split(r"\s*[,;]\s*", cell)):
            other = re.fullmatch(r"what (\w+) may import", entry)
            found |= table[other[1]] if other else {entry.replace("front door", FRONT_DOOR)}
        table[room.replace("front door", FRONT_DOOR)] = found
    return table


MODULES = sorted(SOURCE_DIR.rglob("*.py"))


def test_the_map_has_this_table() -> None:
    written = read_room_table((SOURCE_DIR.parents[1] / "ARCHITECTURE.md").read_text("utf-8"))
    beyond_words = {room: entries - WORDS for room, entries in MAY_IMPORT.items()}
    assert written == {
        room: entries
        for room, entries in beyond_words.items()
        if room not in WORDS | {"__main__", "assets"}
    }


def test_a_map_that_differs_is_found() -> None:
    rows = "| a | this | x, front door | |\n| b | that | what a may import; y.z | never |"
    table = read_room_table(
        f"Text\n\n| room | owns | also | never |\n|---|---|---|---|\n{rows}\n\n| c |"
    )
    assert table == {"a": {"x", FRONT_DOOR}, "b": {"x", FRONT_DOOR, "y.z"}}


@pytest.mark.parametrize("module_path", MODULES, ids=lambda p: p.relative_to(SOURCE_DIR).as_posix())
def test_module_keeps_to_the_table(module_path: Path) -> None:
    path = PurePosixPath(module_path.relative_to(SOURCE_DIR).as_posix())
    assert find_faults(path, module_path.read_text(encoding="utf-8")) == []


def test_the_walk_finds_the_package() -> None:
    names = {path.relative_to(SOURCE_DIR).as_posix() for path in MODULES}
    assert {"__init__.py", "errors.py", "model/llama.py"} <= names


def test_rooms_import_downwards_only() -> None:
    """No two rooms may import each other, not even by way of others."""
    below = {
        room: {entry.split(".")[0] for entry in entries if entry != "__init__.__version__"}
        for room, entries in MAY_IMPORT.items()
    }
    while below:
        lowest = {room for room, entries in below.items() if not entries & below.keys()}
        assert lowest, f"these rooms import each other in a circle: {sorted(below)}"
        below = {room: entries for room, entries in below.items() if room not in lowest}


@pytest.mark.parametrize(
    ("path", "statement", "fault"),
    [
        # Each form that an import can take.
        ("engine/runner.py", "from minigpt4_runtime.server.app import x", "server.app.x"),
        ("engine/runner.py", "import minigpt4_runtime.server", "may not import server"),
        ("engine/runner.py", "from ..server import app", "server.app"),
        ("engine/runner.py", "from minigpt4_runtime import server", "may not import server"),
        ("engine/runner.py", "def f():\n    from ..api import x", ":3: engine may not import"),
        ("engine/runner.py", "async def f():\n    import minigpt4_runtime.api", "import api"),
        ("engine/runner.py", "if TYPE_CHECKING:\n    from ..api import x", "import api"),
        ("engine/runner.py", "try:\n    from ..api import x\nfinally: ...", "import api"),
        ("engine/runner.py", "T = {'cuda': 'minigpt4_runtime.devices.cuda:C'}", "devices.cuda.C"),
        ("engine/runner.py", "import minigpt4_runtime", "the package as a whole"),
        # One submodule of a room, and one name of a module.
        ("engine/runner.py", "from minigpt4_runtime.devices import resolve", "devices.resolve"),
        ("engine/runner.py", "from ..devices.contracts_old import x", "devices.contracts_old"),
        ("cli/chat.py", "from minigpt4_runtime.text.prompt import render", "text.prompt.render"),
        # What each room never does.
        ("devices/npu.py", "from minigpt4_runtime.devices.cuda import C", "another device"),
        ("errors.py", "from minigpt4_runtime.config import ModelConfig", "import config"),
        ("text/prompt.py", "from ..images.pixels import load", "text may not import images"),
        ("model/llama.py", "from minigpt4_runtime.engine import engine", "engine.engine"),
        ("bench/latency.py", "from minigpt4_runtime.engine.engine import E", "engine.engine.E"),
        ("api.py", "from minigpt4_runtime.cli.main import run", "api may not import cli"),
        ("model/llama.py", "from minigpt4_runtime import MiniGPT4", "may not import MiniGPT4"),
        # Packages of others.
        ("config.py", "import numpy", "only the standard library, not numpy"),
        ("messages.py", "def f():\n    import numpy", "only the standard library"),
        ("text/tokenizer.py", "import torch", "must load without torch"),
        ("cli/chat.py", "from torch import nn", "must load without torch"),
        # Form.
        ("utils.py", "", "no room of the table"),
        ("model/helpers.py", "", "says nothing"),
        ("model/layers/norm.py", "", "deeper than 2 levels"),
    ],
)
def test_a_fault_is_found(path: str, statement: str, fault: str) -> None:
    faults = find_faults(PurePosixPath(path), f'"""A module."""\n{statement}\n')
    assert any(fault in found for found in faults), faults


def test_a_missing_docstring_is_found() -> None:
    assert find_faults(PurePosixPath("model/llama.py"), "import torch") == [
        "model/llama.py: no docstring says what this module owns"
    ]


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("model/llama.py", "import torch\nfrom minigpt4_runtime.model.linear import Linear"),
        ("model/llama.py", "from minigpt4_runtime import __version__, errors"),
        ("engine/runner.py", "from minigpt4_runtime.devices import contracts"),
        ("engine/runner.py", "from ..devices.contracts import DeviceFacts"),
        ("bench/latency.py", "from minigpt4_runtime import MiniGPT4"),
        ("cli/chat.py", "def f():\n    import torch"),
        ("cli/chat.py", "from minigpt4_runtime.text.prompt import DESCRIBE_PROMPT"),
        ("messages.py", "if TYPE_CHECKING:\n    from PIL.Image import Image"),
        ("devices/registry.py", "D = {'cpu': 'minigpt4_runtime.devices.cpu:CpuBackend'}"),
    ],
)
def test_what_the_table_allows_passes(path: str, statement: str) -> None:
    assert find_faults(PurePosixPath(path), f'"""A module."""\n{statement}\n') == []
