"""Access to the server: API keys, and the addresses and names of a server without keys.

Owns   the reading and comparing of keys, and the test for this machine's own names.
Takes  a key file, a host, and each request's headers.
Never  logs a key; comparing takes the same time for every key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.server.failures import Failure, error_response

MIN_KEY_LENGTH = 16
_OPEN_PATHS = frozenset({"/health"})


def read_keys(path: Path) -> tuple[str, ...]:
    """One key a line; blank lines and lines that begin with # are left out.

    Raises:
        ConfigError: the file cannot be read, holds no key, or one that is easily guessed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a file of API keys ({error}).") from None
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise ConfigError(f"{path} holds no API key. Write one a line.")
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_KEY_LENGTH or not key.isascii() or " " in key:
            raise ConfigError(
                f"Key {number} of {path} must be {MIN_KEY_LENGTH} or more ASCII characters without "
                "blanks. Make one with: openssl rand -hex 24"
            )
    return keys


def check_host(host: str, *, has_keys: bool, is_insecure: bool) -> None:
    """Refuse to let a whole network in without keys.

    Raises:
        ConfigError: the address is not this machine's own, and there are no keys.
    """
    if has_keys or is_insecure or is_loopback(host):
        return
    raise ConfigError(
        f"Everyone who reaches {host} could use this server. Give --api-key-file, or --insecure if "
        "that is intended."
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class KeyGuard:
    """Passes requests with one of the keys, and answers all others with 401, on any route.

    A key is sent as a bearer token, or by browsers as the password of any user.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], *, asks_browsers: bool = False) -> None:
        self._app = app
        self._challenge = 'Basic realm="MiniGPT-4"' if asks_browsers else "Bearer"
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request from outside."""
        is_open = scope["type"] == "lifespan" or scope.get("path") in _OPEN_PATHS
        if is_open or not self._digests or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        refusal = Failure(
            401,
            "This server needs an API key: send the header 'Authorization: Bearer KEY'.",
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": self._challenge},
        )
        await error_response(refusal)(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        given = _digest(_key(headers[0]) if len(headers) == 1 else b"")
        # All keys are compared, each in constant time, so that the time reveals nothing.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


class NameGuard:
    """Refuses requests to names that are not this machine's own, for a server without keys.

    If another site's name leads to this machine (DNS rebinding), browsers let that site's scripts
    send requests and read the answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check under which name a request came."""
        if scope["type"] != "http" or _is_own_name(host := Headers(scope=scope).get("host", "")):
            await self._app(scope, receive, send)
            return
        refusal = Failure(
            403,
            f"This answers to localhost and to addresses only, not to {host!r}. With keys, "
            "`minigpt4 serve` answers to any name: see docs/serving.md.",
            kind="permission_error",
            code="unknown_host",
        )
        await error_response(refusal)(scope, receive, send)


def _is_own_name(host: str) -> bool:
    """Whether no other site can have this name; old clients may send none."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in ("", "localhost") or name.endswith(".localhost") or bool(ip_address(name))
    except ValueError:
        return False


def _key(header: bytes) -> bytes:
    """The key in an Authorization header; empty if the header is of another kind."""
    scheme, _, value = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        with suppress(binascii.Error):
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    return b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
