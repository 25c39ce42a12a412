"""The room for uploaded images: a limit on their bytes, and the removal of failed uploads.

Owns   the count of recent uploads, and the reading of an upload.
Takes  the bytes of uploads as they arrive.
Never  opens an image, or deletes a whole upload: Gradio does, by its age.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4_runtime.optional import require

gradio = require("gradio", extra="web")

# A file takes a block of the disk at least, and an entry in its folder.
_BYTES_PER_UPLOAD = 2**12
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(eq=False)
class Upload:
    """One upload: when it began, and how much of it is kept."""

    began: float
    num_bytes: int = _BYTES_PER_UPLOAD


class UploadRoom:
    """The uploads of the last `seconds`, after which Gradio deletes them: `max_bytes` at most."""

    def __init__(
        self, *, max_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_bytes = max_bytes
        self.seconds = seconds
        self._clock = clock
        self._uploads: deque[Upload] = deque()
        self._num_bytes = 0

    def begin(self) -> Upload:
        """Count a new upload."""
        self._uploads.append(Upload(self._clock()))
        self._num_bytes += _BYTES_PER_UPLOAD
        return self._uploads[-1]

    def add(self, upload: Upload, num_bytes: int) -> bool:
        """Count more bytes of an upload; return whether there is room for them."""
        upload.num_bytes += num_bytes
        self._num_bytes += num_bytes
        while self._uploads and self._uploads[0].began + self.seconds < self._clock():
            self._num_bytes -= self._uploads.popleft().num_bytes
        return self._num_bytes <= self.max_bytes

    def forget(self, upload: Upload) -> None:
        """Stop counting an upload that failed and was deleted."""
        if upload in self._uploads:
            self._uploads.remove(upload)
            self._num_bytes -= upload.num_bytes


class TidyParser(gradio.route_utils.GradioMultiPartParser):  # type: ignore[misc, name-defined]
    """Reads an upload, and deletes one that fails: Gradio itself would keep a part of it."""

    async def parse(self) -> Any:
        """Read to the end, or delete the files."""
        try:
            return await super().parse()
        except BaseException:
            for file in self._files_to_close_on_error:
                with suppress(OSError):
                    file.close()
                with suppress(OSError):
                    Path(file.name).unlink(missing_ok=True)
            raise


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or a cause of it, is a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
