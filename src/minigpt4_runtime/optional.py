"""The import of optional packages.

Owns   the message that tells a user what to install.
Takes  a module name and the command that installs it; gives the module.
Never  hides a package that is installed but broken: that error passes through unchanged.
"""

import importlib
from types import ModuleType

from minigpt4_runtime.errors import BackendUnavailableError


def require(module_name: str, *, install: str) -> ModuleType:
    """Import `module_name`, or say how to get it.

    Example: `require("torch_npu", install="pip install torch_npu")`.

    Raises:
        BackendUnavailableError: the package is not installed.
    """
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module_name.split(".")[0]:
            raise  # The package is installed, but one that it needs is not.
        raise BackendUnavailableError(
            f"{module_name} is not installed on this machine. Run: {install}"
        ) from None
