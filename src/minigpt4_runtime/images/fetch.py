"""A URL of http or https → the bytes of an image, from public addresses only.

Owns   the allowed form of a URL, the test for public addresses, and the limits on an answer.
Takes  a Target; gives its content. Every fault is an ImageError.
Never  follows a redirect, takes a proxy, or connects to an address that was not checked: a client
       library would resolve the name once more.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from minigpt4_runtime.errors import ImageError
from minigpt4_runtime.optional import require

if TYPE_CHECKING:
    import h11
else:
    h11 = require("h11", extra="server")

MAX_BYTES = 32 * 2**20
SECONDS = 10.0

_PORTS = {"http": 80, "https": 443}
# Not public, though some versions of Python miss the first, and the second looks public: IETF
# protocols (and Oracle's metadata), and the settings of Azure's machines.
_NOT_PUBLIC = (ipaddress.ip_network("192.0.0.0/24"), ipaddress.ip_network("168.63.129.16/32"))
_UNICAST_V6 = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_READ_BYTES = 64 * 2**10

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


async def fetch(
    target: Target,
    *,
    max_bytes: int = MAX_BYTES,
    seconds: float = SECONDS,
    allows_local: bool = False,
) -> bytes:
    """Get an image. `allows_local` permits this machine and private networks.

    Raises:
        ImageError: it may not or cannot be fetched; the message names the host.
    """
    try:
        async with asyncio.timeout(seconds):
            address = await target.address(allows_local=allows_local)
            return await _Download(target, address, max_bytes).run()
    except TimeoutError:
        reason = f"it took longer than {seconds:g} seconds"
    except h11.RemoteProtocolError as error:
        reason = f"its answer is not HTTP: {error}"
    except (OSError, ssl.SSLError) as error:
        reason = f"the connection failed: {error.strerror or type(error).__name__}"
    raise ImageError(f"The picture at {target.name} could not be fetched: {reason}.")


@dataclass(frozen=True)
class Target:
    """The parts of a URL: a host by name, and the path to request."""

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
        """The host, with the port unless it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    async def address(self, *, allows_local: bool) -> str:
        """Resolve the name once. All its addresses must be allowed, and one of them is given.

        Raises:
            ImageError: one is not public: the name may lead into a network that trusts us.
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        addresses = [str(each[4][0]) for each in found]
        if not addresses or not (allows_local or all(map(is_public, addresses))):
            raise ImageError(
                f"{self.name} leads to an address that is not public. Give one that is, or the "
                "picture itself."
            )
        return addresses[0]


def is_public(text: str) -> bool:
    """Whether an address is a public one, and so are all IPv4 addresses within it."""
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
            ImageError: it is no image, too large, or elsewhere.
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
        if not kind.startswith("image/") or kind == "image/svg+xml":
            self._refuse("its content type is not that of a picture")
        length = headers.get(b"content-length", b"0")
        self._check_size(int(length) if length.isdigit() else 0)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            self._refuse(f"it has more than {self._max_bytes:,} bytes")

    def _refuse(self, reason: str) -> None:
        raise ImageError(f"The picture at {self._target.name} could not be fetched: {reason}.")
