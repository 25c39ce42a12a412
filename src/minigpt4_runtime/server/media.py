"""The images that a request names by URL.

Owns   the rule for which URLs are allowed.
Takes  the URL of a content part; gives an ImageSource, still unopened.
Never  fetches from a host that is not in `domains`.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from minigpt4_runtime.errors import ImageError
from minigpt4_runtime.images.fetch import MAX_BYTES, SECONDS, Target, fetch
from minigpt4_runtime.messages import ImageSource, image


@dataclass(frozen=True, kw_only=True)
class MediaPolicy:
    """The allowed origins of images. `domains` are hosts as written in a URL, or host:port."""

    domains: frozenset[str] = frozenset()
    folder: Path | None = None
    max_bytes: int = MAX_BYTES
    seconds: float = SECONDS

    async def open(self, url: str) -> ImageSource:
        """Give the image behind a URL.

        Raises:
            ImageError: it may not be opened, or cannot be fetched.
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
        """The content of an allowed file. As bytes, later errors do not name its path."""
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
        # The answer must not reveal whether a file outside exists.
        if not is_readable or parts.netloc not in {"", "localhost"}:
            raise refused
        return path

    async def _fetch(self, url: str) -> bytes:
        target = Target.read(url)
        if target.name not in self.domains:
            raise ImageError(
                f"This server fetches no pictures from {target.name}. Send it as a data URL."
            )
        return await fetch(target, max_bytes=self.max_bytes, seconds=self.seconds)
