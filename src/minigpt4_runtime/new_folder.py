"""A folder for what a command writes.

Owns   its making, and its removal where nothing came to be in it.
Takes  a path.
Never  removes what was there before, or a folder with anything in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder and those above it, where they are not there yet.

    If the block ends with any error, those of them that are empty are removed again.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in made:
            with suppress(OSError):
                each.rmdir()
        raise
