"""Pictures that a request names: what is opened, and from where.

Owns   which URLs are allowed, and the fetching of those from other machines.
Takes  the URL of a content part; gives an ImageSource, still unopened.
Never  follows a redirect, or connects to an address that is not public and was not checked.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import h11

from minigpt4_runtime.errors import ImageError
from minigpt4_runtime.messages import ImageSource, image

_PORTS = {"http": 80, "https": 443}
_CONTENT_TYPES = frozenset(
    {"image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff"}
)
# Not for the public, though not every Python knows of the first, and the second looks like it: IETF
# protocols (and Oracle's metadata), and where Azure's machines find their settings.
_NOT_PUBLIC = (ipaddress.ip_network("192.0.0.0/24"), ipaddress.ip_network("168.63.129.16/32"))
_UNICAST_V6 = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_READ_BYTES = 64 * 2**10

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, kw_only=True)
class MediaPolicy:
    """From where pictures may come: `domains` are hosts as written in a URL, or host:port."""

    domains: frozenset[str] = frozenset()
    folder: Path | None = None
    max_bytes: int = 32 * 2**20
    seconds: float = 10.0

    async def open(self, url: str) -> ImageSource:
        """Give the picture behind a URL.

        Raises:
            ImageError: it may not be opened, or not be had.
        """
        start = url[:6].lower()  # Not all of it: a data URL is long.
        if start.startswith("data:"):
            return image(url)
        if start.startswith("file:"):
            return image(await asyncio.to_thread(self._read_file, url))
        if start.startswith(("http:", "https:")):
            return image(await self._fetch(url))
        raise ImageError(
            "A picture's URL begins with data:, or with http:, https: or file: where the server "
            "allows it."
        )

    def _read_file(self, url: str) -> bytes:
        """What an allowed file holds: an error about it later must not name its path."""
        with self._allowed_path(url).open("rb") as file:
            content = file.read(self.max_bytes + 1)
        if len(content) > self.max_bytes:
            raise ImageError(f"The file has more than {self.max_bytes:,} bytes.")
        return content

    def _allowed_path(self, url: str) -> Path:
        refused = ImageError("This server opens no such file. Send the picture as a data URL.")
        if self.folder is None:
            raise refused
        try:
            parts = urlsplit(url)
            path = Path(unquote(parts.path, errors="strict")).resolve()
            is_inside = path.is_relative_to(self.folder.resolve())
            is_readable = is_inside and path.is_file() and os.access(path, os.R_OK)
        except (ValueError, OSError, RuntimeError):  # A null character, a loop, a long name.
            raise refused from None
        # Whether a file outside exists must not show.
        if not is_readable or parts.netloc not in {"", "localhost"}:
            raise refused
        return path

    async def _fetch(self, url: str) -> bytes:
        target = Target.read(url)
        if target.name not in self.domains:
            raise ImageError(
                f"This server fetches no pictures from {target.name}. Send it as a data URL."
            )
        try:
            async with asyncio.timeout(self.seconds):
                address = await target.public_address()
                return await _Download(target, address, self.max_bytes).run()
        except TimeoutError:
            reason = f"it took longer than {self.seconds:g} seconds"
        except h11.RemoteProtocolError as error:
            reason = f"its answer is not HTTP: {error}"
        except (OSError, ssl.SSLError) as error:
            reason = f"the connection failed: {error.strerror or type(error).__name__}"
        raise ImageError(f"The picture at {target.name} could not be fetched: {reason}.")


@dataclass(frozen=True)
class Target:
    """Where a URL leads: a host by name, and what to ask of it."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def read(cls, url: str) -> Target:
        """Take a URL apart.

        Raises:
            ImageError: it is no http URL, or one with a user's name in it.
        """
        refused = ImageError("A picture's URL is not a usable http or https URL.")
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise refused from None
        if not host or not host.isascii() or "@" in parts.netloc or "\\" in url:
            raise refused
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        if parts.query:
            path += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
        return cls(parts.scheme, host, port or _PORTS[parts.scheme], path)

    @property
    def name(self) -> str:
        """The host, with the port where it is another than the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    async def public_address(self) -> str:
        """Resolve the name once. All its addresses must be public, and one of them is given.

        Raises:
            ImageError: one is not: the name may lead into a network that trusts this machine.
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        addresses = [str(each[4][0]) for each in found]
        if not addresses or not all(map(is_public, addresses)):
            raise ImageError(f"{self.name} leads to an address that is not public.")
        return addresses[0]


def is_public(text: str) -> bool:
    """Whether an address is one of the internet's, and no address in it leads elsewhere."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:  # A zone, as in fe80::1%eth0.
        return False
    if address.version == 6 and not any(address in each for each in (_UNICAST_V6, _NAT64)):
        return False
    return all(
        each.is_global and not each.is_multicast and not any(each in net for net in _NOT_PUBLIC)
        for each in (address, *_inner_addresses(address))
    )


def _inner_addresses(address: Address) -> list[Address]:
    """IPv4 addresses to which an IPv6 address is translated on the way."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [each for each in inner if each is not None]


class _Download:
    """One GET, from one address."""

    def __init__(self, target: Target, address: str, max_bytes: int) -> None:
        self._target = target
        self._address = address
        self._max_bytes = max_bytes
        self._http = h11.Connection(h11.CLIENT)

    async def run(self) -> bytes:
        """Give the body.

        Raises:
            ImageError: it is no picture, too large, or elsewhere.
        """
        is_tls = self._target.scheme == "https"
        reader, writer = await asyncio.open_connection(
            self._address,
            self._target.port,
            ssl=ssl.create_default_context() if is_tls else None,
            # The certificate must be the name's, though the connection goes to the address.
            server_hostname=self._target.host if is_tls else None,
        )
        try:
            writer.write(self._question())
            await writer.drain()
            return await self._answer(reader)
        finally:
            writer.transport.abort()

    def _question(self) -> bytes:
        headers = [
            ("Host", self._target.name), ("Accept", "image/*"), ("Accept-Encoding", "identity"),
            ("User-Agent", "minigpt4-runtime"), ("Connection", "close"),
        ]  # fmt: skip
        request = h11.Request(method="GET", target=self._target.path, headers=headers)
        return (self._http.send(request) or b"") + (self._http.send(h11.EndOfMessage()) or b"")

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        content = bytearray()
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await reader.read(_READ_BYTES))
            elif isinstance(event, h11.Response):
                self._check_head(event)
            elif isinstance(event, h11.Data):
                content += event.data
                self._check_size(len(content))
            elif isinstance(event, h11.EndOfMessage):
                return bytes(content)

    def _check_head(self, head: h11.Response) -> None:
        headers = {bytes(name): bytes(value) for name, value in head.headers}
        if head.status_code != 200:
            self._refuse(f"the status is {head.status_code}, not 200; redirects are not followed")
        kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if kind not in _CONTENT_TYPES:
            self._refuse("its content type is not that of a picture")
        length = headers.get(b"content-length", b"0")
        self._check_size(int(length) if length.isdigit() else 0)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            self._refuse(f"it has more than {self._max_bytes:,} bytes")

    def _refuse(self, reason: str) -> None:
        raise ImageError(f"The picture at {self._target.name} could not be fetched: {reason}.")
