"""The findings of `minigpt4 doctor` about this machine.

Owns   the checks, the devices, which preset fits where, the extras and the state of the cache.
Takes  a function that tries the model out; gives a Diagnosis.
Never  raises an error for a finding, a broken torch included.
"""

import importlib
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import count, product
from typing import Any

from minigpt4_runtime.checkpoint import shelf
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.weights import show_bytes
from minigpt4_runtime.config import DTYPE_NAMES, CacheDTypeName, DTypeName
from minigpt4_runtime.errors import BackendUnavailableError, ConfigError, MiniGPT4Error
from minigpt4_runtime.formats.dense import DENSE

DISTRIBUTION = "minigpt4-runtime"
_PACKAGES = ("torch", "numpy", "sentencepiece", "PIL", "typer", "rich")
_INSTALLED_AS = {"PIL": "pillow"}
_OLDEST_PYTHON = (3, 11)
# Weights, and the dtype of all that is computed. Rows of 8 bits (w8a8) take no more memory.
_WAYS: tuple[tuple[str, DTypeName], ...] = (
    *((DENSE.name, dtype) for dtype in DTYPE_NAMES),
    ("w8a16", "float32"), ("w8a16", "float16"), ("w4a16", "float32"), ("w4a16", "float16"),
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One finding. Without a needed one no picture can be described.

    `todo` is the remedy if `is_well` is False.
    """

    name: str
    is_well: bool
    seen: str
    todo: str = ""
    is_needed: bool = True


@dataclass(frozen=True)
class Device:
    """A device that opens. `free_bytes` is None if the system does not report it.

    Of what weights leave free, keys and values take `cache_share`.
    """

    name: str
    free_bytes: int | None
    default_dtype: str
    cache_share: float


@dataclass(frozen=True)
class Fit:
    """Whether a preset in a dtype fits into a device; None if its free memory is unknown.

    `weights` is float, or what `minigpt4 quantise --format` makes of it. `tokens` says how many
    tokens' keys and values the engine would keep beside the weights, by its cache_dtype.
    """

    preset: str
    weights: str
    dtype: str
    device: str
    needed_bytes: int
    fits: bool | None
    tokens: dict[CacheDTypeName, int] | None


@dataclass(frozen=True)
class Extra:
    """An extra of this package, its missing packages, and the command to install it."""

    name: str
    missing: tuple[str, ...]
    install: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings."""

    checks: tuple[Check, ...]
    devices: tuple[Device, ...]
    fits: tuple[Fit, ...]
    extras: tuple[Extra, ...]
    models: tuple[str, ...]
    downloads_bytes: int
    home: str

    @property
    def can_run(self) -> bool:
        """Whether a picture can be described on this machine."""
        return all(check.is_well for check in self.checks if check.is_needed)

    def as_mapping(self) -> dict[str, Any]:
        """Plain values, for json.dumps."""
        return {"can_run": self.can_run, **asdict(self)}


def diagnose(try_model: Callable[[], str]) -> Diagnosis:
    """Look at everything. `try_model` describes a picture with the bundled model."""
    checks = [_check_python(), *map(_check_package, _PACKAGES)]
    devices: list[Device] = []
    fits: list[Fit] = []
    if all(check.is_well for check in checks):
        found = list(_find_devices())
        devices = [each for each in found if isinstance(each, Device)]
        checks += [each for each in found if isinstance(each, Check)]
        fits = list(_find_fits(devices))
        checks += [_check_kernels(), _check_model(try_model)]
    check, home, models, downloads_bytes = _look_at_cache()
    return Diagnosis(
        checks=(*checks, check),
        devices=tuple(devices),
        fits=tuple(fits),
        extras=tuple(_find_extras()),
        models=tuple(model.name for model in models),
        downloads_bytes=downloads_bytes,
        home=home,
    )


def _check_python() -> Check:
    wanted = ".".join(map(str, _OLDEST_PYTHON))
    seen = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check(
        "Python", sys.version_info >= _OLDEST_PYTHON, seen, f"Install Python {wanted} or newer."
    )


def _check_package(name: str) -> Check:
    package = _INSTALLED_AS.get(name, name)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # If another module is missing, the package is installed but broken.
        again = f"Run: pip install --force-reinstall {package}"
        todo = f"Run: pip install {DISTRIBUTION}" if error.name == name else again
        return Check(name, False, f"{error}", todo)
    except Exception as error:  # noqa: BLE001 - A broken package may raise anything.
        first = (str(error).splitlines() or [""])[0]
        todo = "It is installed but broken: install it again."
        return Check(name, False, f"{type(error).__name__}: {first}", todo)
    try:
        return Check(name, True, metadata.version(package))
    except metadata.PackageNotFoundError:
        # As with pillow-simd, which is imported as PIL too.
        return Check(name, True, f"here, though not installed as {package}")


def _check_kernels() -> Check:
    from minigpt4_runtime.kernels import native

    package, lost = native.find()
    if package is None:
        seen, _, todo = lost.partition(". Run: ")
        return Check("CPU kernels", False, f"{seen}.", f"Run: {todo}", is_needed=False)
    return Check("CPU kernels", True, f"chosen of {', '.join(package.levels())}: {package.level()}")


def _find_devices() -> Iterator[Device | Check]:
    """Every device that opens, and a failed check for every kind whose package is broken."""
    from minigpt4_runtime.devices.registry import DEVICES, open_device

    for kind in DEVICES:
        for index in count():
            name = kind if kind == "cpu" else f"{kind}:{index}"
            try:
                device = open_device(name)
                facts = device.facts
                yield Device(
                    name, device.free_memory_bytes(), facts.default_dtype, facts.cache_share
                )
            except BackendUnavailableError:
                break
            except Exception as error:  # noqa: BLE001 - as above.
                yield Check(name, False, str(error), f"Install its package again, or avoid {kind}.",
                            is_needed=False)  # fmt: skip
                break
            if kind == "cpu":
                break


def _find_fits(devices: list[Device]) -> Iterator[Fit]:
    from minigpt4_runtime.checkpoint.sizes import fitting_tokens, running_bytes, weight_bytes
    from minigpt4_runtime.presets import PRESETS
    from minigpt4_runtime.quantise.choice import QuantisePlan, choose

    for preset, (weights, dtype) in product(PRESETS, _WAYS):
        plan = QuantisePlan(weights=weights)
        formats = DENSE.name if weights == DENSE.name else choose(plan, PRESETS[preset])
        needed = running_bytes(preset, dtype, formats)
        for device in devices:
            fits, tokens = None, None
            if device.free_bytes is not None:
                fits = needed <= device.free_bytes
                left = device.free_bytes - weight_bytes(preset, dtype, formats)
                kept: tuple[CacheDTypeName, ...] = (dtype, "int8", "int4")
                tokens = {
                    name: fitting_tokens(preset, name, int(left * device.cache_share))
                    for name in kept
                }
            yield Fit(preset, weights, dtype, device.name, needed, fits, tokens)


def _check_model(try_model: Callable[[], str]) -> Check:
    try:
        return Check("describe a picture", True, try_model())
    except Exception as error:  # noqa: BLE001 - Any error is a finding.
        todo = (
            "Install the package again; if that does not help, report what "
            "`minigpt4 demo --debug` shows."
        )
        return Check("describe a picture", False, f"{type(error).__name__}: {error}", todo)


def _look_at_cache() -> tuple[Check, str, list[shelf.ShelvedModel], int]:
    """A check, the cache's folder or "", its models, and the bytes of kept downloads."""
    todo = f"Set {shelf.HOME_VARIABLE} to a folder that can be written."
    models: list[shelf.ShelvedModel] = []
    downloads = 0
    try:
        home = shelf.home_dir()
    except ConfigError:
        check = Check("cache", False, "no user's home is known", todo, is_needed=False)
        return check, "", models, downloads
    try:
        models = shelf.list_models()
        downloads = shelf.measure(shelf.downloads_dir())
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
        names = ", ".join(map(_show_model, models))
        kept = f"; {show_bytes(downloads)} of downloads" if downloads else ""
        seen = f"{home}: {names or 'no models'}{kept}"
        check = Check("cache", True, seen, is_needed=False)
    except OSError as error:
        seen = f"{home} cannot be read and written ({error.strerror})"
        check = Check("cache", False, seen, todo, is_needed=False)
    return check, str(home), models, downloads


def _show_model(model: shelf.ShelvedModel) -> str:
    """A model's name, size and context, as far as its config.json can be read."""
    size = show_bytes(model.num_bytes)
    try:
        language = load_config(model.path).language
    except MiniGPT4Error:
        return f"{model.name} ({size})"
    scaling = f" by {language.rope_scaling}" if language.rope_scaling else ""
    return f"{model.name} ({size}, context of {language.context_length} tokens{scaling})"


def _find_extras() -> Iterator[Extra]:
    """The extras that this package declares, each with its missing packages."""
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return
    needs: dict[str, list[str]] = {
        name: [] for name in distribution.metadata.get_all("Provides-Extra") or ()
    }
    for requirement in distribution.requires or ():
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"]([\w.-]+)['\"]", requirement)
        if name and extra and extra[1] in needs and not any(metadata.distributions(name=name[0])):
            needs[extra[1]].append(name[0])
    for extra_name, missing in needs.items():
        yield Extra(extra_name, tuple(missing), f"pip install '{DISTRIBUTION}[{extra_name}]'")
