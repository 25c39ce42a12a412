"""Places of images → their records: what is missing needs no model, all else is asked together.

Owns   the record of a missing file, and the way from a model's results back to their images.
Takes  the images by name with their sources, and how they are asked; gives records as they come.
Never  opens an image or loads a model: only `ask` does, and only if an image is there.
"""

from collections.abc import Callable, Iterator, Sequence

from minigpt4_runtime.batch.results import Record
from minigpt4_runtime.messages import Described, ImageSource


def ask_about(
    names: Sequence[str],
    sources: Sequence[ImageSource | None],
    ask: Callable[[list[ImageSource]], Iterator[Described]],
) -> Iterator[tuple[int, Record]]:
    """Records with their indices in the list: those without a source, which are missing, first."""
    present = []
    for index, (name, source) in enumerate(zip(names, sources, strict=True)):
        if source is None:
            yield index, Record(image=name, seconds=0.0, error=f"{name} does not exist.")
        else:
            present.append((index, source))
    if present:
        for described in ask([source for _, source in present]):
            index, _ = present[described.index]
            yield index, Record.of(names[index], described)
