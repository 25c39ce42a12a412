"""The rows of recent images.

Owns   digest → rows, bounded in bytes; the least recently used go first.
Takes  tensors as the vision encoder gives them. Never encodes anything.
"""

from collections import OrderedDict

from torch import Tensor


class ImageCache:
    """Rows by digest."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[str, Tensor] = OrderedDict()
        self.num_bytes = 0

    def get(self, digest: str) -> Tensor | None:
        """The rows of an image, if they are still here."""
        rows = self._rows.get(digest)
        if rows is not None:
            self._rows.move_to_end(digest)
        return rows

    def put(self, digest: str, rows: Tensor) -> None:
        """Keep an image's rows, and drop others until all fit."""
        if digest in self._rows:
            self.num_bytes -= self._rows.pop(digest).nbytes
        self._rows[digest] = rows
        self.num_bytes += rows.nbytes
        while self.num_bytes > self._max_bytes:
            _, dropped = self._rows.popitem(last=False)
            self.num_bytes -= dropped.nbytes
