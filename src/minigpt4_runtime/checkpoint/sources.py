"""The table of sources: the published files of each model, and their addresses.

Owns   sources.toml, its form, and the replacement of its entries by those of a user's own table.
Takes  a table in TOML; gives ModelSources.
Never  reaches a network: an address is a string here.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

from minigpt4_runtime.config import check_field_names
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.presets import PRESETS

PartRole = Literal["language", "vision", "qformer", "bert", "projection"]
# spaces/, the repository, its revision and a file's name.
HUB_PLACE = re.compile(r"hub:(spaces/)?([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")
TABLE_PATH = Path(__file__).with_name("sources.toml")

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VARIANTS = (
    {"language", "vision", "projection"},
    {"language", "vision", "projection", "qformer", "bert"},
)
_KINDS = {list: "a list", str: "a text", int: "a whole number"}
_Entry = TypeVar("_Entry", "_ModelEntry", "_PartEntry", "_FileEntry")


@dataclass(frozen=True)
class SourceFile:
    """One published file: its name, its addresses, and its size and digest if they are known."""

    name: str
    hosts: tuple[str, ...]
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class PublishedPart:
    """The files of one role in a model, a description of them, and their licence."""

    name: str
    role: PartRole
    what: str
    licence: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True)
class ModelSources:
    """The parts of one model. `preset` names its sizes, if they are known beforehand."""

    name: str
    parts: tuple[PublishedPart, ...]
    preset: str | None


@dataclass(frozen=True)
class _ModelEntry:
    parts: list[str]
    preset: str | None = None


@dataclass(frozen=True)
class _PartEntry:
    role: str
    hosts: list[str]
    files: list[dict[str, Any]]
    what: str = ""
    licence: str = "not stated"


@dataclass(frozen=True)
class _FileEntry:
    name: str
    size: int | None = None
    sha256: str | None = None


def read_sources(own_path: Path | None = None) -> dict[str, ModelSources]:
    """Read the table, with the entries of a user's own in place of those of the same name.

    Raises:
        ConfigError: the user's table cannot be read, or an entry of it makes no sense.
    """
    table = _read_table(TABLE_PATH)
    where = TABLE_PATH
    if own_path is not None:
        where, own = own_path, _read_table(own_path)
        table = {kind: {**table[kind], **own[kind]} for kind in table}
    parts = {name: _read_part(where, name, values) for name, values in table["parts"].items()}
    return {
        name: _read_model(where, name, values, parts) for name, values in table["models"].items()
    }


def is_web_address(text: str) -> bool:
    """Whether a text is http:// or https:// with a host, and a port that can be one."""
    try:
        parts = urlsplit(text)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and " " not in parts.netloc
            and parts.port != 0
            and text.isprintable()
        )
    except ValueError:
        return False


def _read_table(path: Path) -> dict[str, dict[str, Any]]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from None
    strange = sorted(table.keys() - {"models", "parts"})
    if strange or not all(isinstance(entries, dict) for entries in table.values()):
        raise ConfigError(
            f"{path}: {', '.join(strange) or 'its content'} is not known here; a table of sources "
            "holds [models.NAME] and [parts.NAME]."
        )
    return {"models": table.get("models", {}), "parts": table.get("parts", {})}


def _read_model(
    path: Path, name: str, values: Any, parts: Mapping[str, PublishedPart]
) -> ModelSources:
    where = f"{path}: models.{name}"
    entry = _read_entry(where, values, _ModelEntry)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: a model's name is letters, digits, '.', '-' and '_'.")
    # In a list, since TOML's values need not be hashable.
    unknown = [part for part in entry.parts if part not in list(parts)]
    if unknown:
        raise ConfigError(f"{where}: there is no [parts.{unknown[0]}].")
    chosen = tuple(parts[part] for part in entry.parts)
    roles = sorted(part.role for part in chosen)
    if not any(roles == sorted(variant) for variant in _VARIANTS):
        raise ConfigError(
            f"{where}: its parts are {', '.join(roles) or 'none'}; a model has one language, "
            "vision and projection, and a qformer with its bert or neither."
        )
    if entry.preset is not None and entry.preset not in PRESETS:
        raise ConfigError(
            f"{where}: preset is {entry.preset!r}; it must be one of {', '.join(PRESETS)}, or "
            "left out."
        )
    return ModelSources(name, chosen, entry.preset)


def _read_part(path: Path, name: str, values: Any) -> PublishedPart:
    where = f"{path}: parts.{name}"
    entry = _read_entry(where, values, _PartEntry)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: a part's name is letters, digits, '.', '-' and '_'.")
    if entry.role not in get_args(PartRole):
        raise ConfigError(
            f"{where}: role is {entry.role!r}; it must be one of {', '.join(get_args(PartRole))}."
        )
    if not entry.hosts:
        raise ConfigError(f"{where}: hosts is {entry.hosts!r}; it must be a list of addresses.")
    for host in entry.hosts:
        if not isinstance(host, str) or not (HUB_PLACE.fullmatch(host) or is_web_address(host)):
            raise ConfigError(
                f"{where}: {host!r} is no place; https://…, http://… or "
                "hub:OWNER/REPOSITORY@REVISION/FILE is wanted (@REVISION may be left out)."
            )
    files = tuple(_read_file(where, file, entry.hosts) for file in entry.files)
    names = {file.name for file in files}
    if len(names) < len(files) or not files:
        raise ConfigError(f"{where}: files must be there, each with a name of its own.")
    if entry.role != "language" and len(files) > 1:
        raise ConfigError(f"{where}: the role {entry.role} is played by one file.")
    return PublishedPart(name, entry.role, entry.what or name, entry.licence, files)  # type: ignore[arg-type]


def _read_file(where: str, values: Any, hosts: list[str]) -> SourceFile:
    entry = _read_entry(f"{where}: files", values, _FileEntry)
    if not _NAME.fullmatch(entry.name):
        raise ConfigError(f"{where}: {entry.name!r} is no plain file name.")
    if entry.sha256 is not None and not _SHA256.fullmatch(entry.sha256):
        raise ConfigError(f"{where}: the sha256 of {entry.name} is no 64 digits 0-9 and a-f.")
    if entry.size is not None and entry.size < 1:
        raise ConfigError(f"{where}: the size of {entry.name} is {entry.size}.")
    places = tuple(host.replace("{name}", entry.name) for host in hosts)
    return SourceFile(entry.name, places, entry.size, entry.sha256)


def _read_entry(where: str, values: Any, kind: type[_Entry]) -> _Entry:
    """Strictly: no name is unknown, none is missing, and each value is of its field's type."""
    known = {field.name: str(field.type) for field in fields(kind)}
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is {values!r}; named values are wanted: {', '.join(known)}.")
    check_field_names(values, tuple(known), where)
    for name, value in values.items():
        wanted = next(each for each in _KINDS if each.__name__ in known[name])
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ConfigError(f"{where}: {name} is {value!r}; {_KINDS[wanted]} is wanted.")
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in values]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}.")
    return kind(**values)
