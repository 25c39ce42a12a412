"""The import of optional packages.

Owns   the message that tells a user what to install, and what Triton needs beside its package.
Takes  a module name, and the extra or the command that installs it; gives the module.
Never  hides a package that is installed but broken: that error passes through unchanged.
"""

import importlib
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from minigpt4_runtime.errors import BackendUnavailableError


def require(module_name: str, *, extra: str = "", install: str = "") -> ModuleType:
    """Import `module_name`, or say how to get it: by an extra of this package, or by `install`.

    Example: `require("gradio", extra="web")`.

    Raises:
        BackendUnavailableError: the package is not installed.
    """
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module_name.split(".")[0]:
            raise  # The package is installed, but one that it needs is not.
        install = install or f"pip install 'minigpt4-runtime[{extra}]'"
        raise BackendUnavailableError(
            f"{module_name} is not installed on this machine. Run: {install}"
        ) from None


def runs_triton(capability: tuple[int, int]) -> bool:
    """Whether Triton is here with all it asks for: a recent GPU, a C compiler, Python's headers."""
    return (
        find_spec("triton") is not None
        and capability >= (8, 0)
        and any(shutil.which(compiler) for compiler in ("gcc", "clang"))
        and Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file()
    )
