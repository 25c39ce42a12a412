"""The limits and times of a server.

Owns   ServerConfig and ConnectionLimits.
Takes  values; refuses those that cannot work.
Never  reads the environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path

from minigpt4_runtime.errors import ConfigError

# An IPv6 client has such a network to itself, and any number of addresses in it.
_V6_CLIENT_BITS = 64


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """How many connections are held, and how many of them, and of the answers, for one client.

    Of a request through one of the `proxies`, or a proxy on this machine, the client that it names
    is counted. Programs on this machine are not counted. Without `per_client` no client is.
    """

    most: int = 512
    per_client: int | None = 256
    proxies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Limits must be above 0, proxies addresses or networks."""
        for name, value in (("most", self.most), ("per_client", self.per_client)):
            if value is not None and value < 1:
                raise ConfigError(f"ConnectionLimits.{name} is {value}; it must be 1 or more.")
        try:
            list(map(ip_network, self.proxies))
        except ValueError as error:
            raise ConfigError(f"A proxy is named by its address or network: {error}.") from None

    @cached_property
    def networks(self) -> list[IPv4Network | IPv6Network]:
        """The addresses whose word about their clients is trusted: this machine's, the proxies'."""
        return [ip_network(each) for each in ("127.0.0.0/8", "::1", *self.proxies)]

    def client_of(self, address: str | None) -> str | None:
        """The client to which an address belongs; None for one that is not counted."""
        try:
            ip = ip_address((address or "").partition("%")[0])
        except ValueError:
            return None
        if self.per_client is None or any(ip in network for network in self.networks):
            return None
        if ip.version == 6:
            return str(ip_network((ip, _V6_CLIENT_BITS), strict=False))
        return str(ip)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Limits on each request and on all together. Times are in seconds.

    `max_requests` counts choices that are being answered or wait for their turn. A body has
    `body_seconds` to arrive, an answer `request_seconds` from then on. An engine that is asked and
    makes no step for `stall_seconds` is asked once more, and has failed after as long again.
    With `own_names_only` it answers to localhost and to addresses, and to no other name; with
    `explains` there is POST /explain.
    """

    model_name: str
    model_description: str = "It describes pictures and answers questions about them."
    max_body_bytes: int = 32 * 2**20
    max_images: int = 8
    max_choices: int = 8
    max_tokens: int = 4096
    max_requests: int = 256
    num_workers: int = 4
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    stall_seconds: float = 120.0
    fetch_seconds: float = 10.0
    media_domains: tuple[str, ...] = ()
    media_dir: Path | None = None
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    own_names_only: bool = False
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    logs_content: bool = False
    explains: bool = False

    def __post_init__(self) -> None:
        """Every limit and every time must be above 0."""
        for name in (each.name for each in fields(self)):
            is_amount = name.startswith(("max_", "num_")) or name.endswith("_seconds")
            if is_amount and not (value := getattr(self, name)) > 0:
                raise ConfigError(f"{name} is {value}; it must be above 0.")
        for domain in self.media_domains:
            if "/" in domain:
                raise ConfigError(f"{domain} is no host. Write HOST or HOST:PORT, as in a.example.")
        if self.media_dir is not None and not self.media_dir.is_dir():
            raise ConfigError(f"{self.media_dir} is no folder. Name one that holds pictures.")
