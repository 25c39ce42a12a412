"""Object stores, and all else that fsspec knows by an address (s3://…, gs://…, memory://…).

Owns   which texts are such addresses, the opening of a store, and the words for its errors.
Takes  an address; gives fsspec's file system and the path in it.
Never  opens web addresses, which are `images.fetch`'s, or knows what is kept in a store.
"""

from __future__ import annotations

import re
from typing import Any

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.optional import require

_ADDRESS = re.compile(r"(?!https?:|file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def is_in_store(place: str) -> bool:
    """Whether this is an address in a store, and no path or web address."""
    return _ADDRESS.match(place) is not None


def open_store(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Raises:
        ConfigError: fsspec does not know it, or lacks a package for it.
    """
    fsspec = require("fsspec", extra="ray")
    try:
        store, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:  # The package of a protocol; an unknown one.
        raise ConfigError(f"{address} cannot be opened: {error}.") from None
    return store, path


def told(error: Exception) -> str:
    """What a store's error says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
