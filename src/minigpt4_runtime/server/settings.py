"""What a server allows, and how long it waits.

Owns   ServerConfig. Takes values; refuses those that cannot work. Never reads the environment.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from minigpt4_runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Limits on each request and on all together. Times are in seconds.

    `max_requests` counts choices that are being answered or wait for their turn. A body has
    `body_seconds` to arrive, an answer `request_seconds` from then on. An engine that is asked and
    makes no step for `stall_seconds` is asked once more, and has failed after as long again.
    With `own_names_only` it answers to localhost and to addresses, and to no other name.
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
    logs_content: bool = False

    def __post_init__(self) -> None:
        """Every limit and every time must be above 0."""
        for field in fields(self):
            is_amount = field.name.startswith(("max_", "num_")) or field.name.endswith("_seconds")
            if is_amount and not (value := getattr(self, field.name)) > 0:
                raise ConfigError(f"{field.name} is {value}; it must be above 0.")
        for domain in self.media_domains:
            if "/" in domain:
                raise ConfigError(f"{domain} is no host. Write HOST or HOST:PORT, as in a.example.")
        if self.media_dir is not None and not self.media_dir.is_dir():
            raise ConfigError(f"{self.media_dir} is no folder. Name one that holds pictures.")
