"""One model at work on a machine of the cluster.

Owns   a loaded model, and the opening of its images.
Takes  a Job once, then names of images; gives their records in the order of the names.
Never  writes a file, or knows what other workers do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_runtime import __version__
from minigpt4_runtime.batch.asking import ask_about
from minigpt4_runtime.cluster.places import sources_of
from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.messages import Described, ImageSource, TaskName

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker is to do. `model` are the arguments of `MiniGPT4.load`.

    Relative paths are read from `folder`; `column` is that of tables; `version` is the driver's.
    """

    model: Mapping[str, Any]
    prompt: str
    sampling: SamplingParams
    task: TaskName | None = None
    folder: Path
    column: str | None = None
    allows_local: bool = False
    version: str = __version__


class Worker:
    """Describes images. It may be asked from several threads at once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._model: MiniGPT4 | None = None

    def load(self) -> None:
        """Load the model.

        Raises:
            ConfigError: this machine has another version of this package.
            MiniGPT4Error: the model cannot be loaded here.
        """
        if self._job.version != __version__:
            raise ConfigError(
                f"A worker has version {__version__} of minigpt4-runtime, and this program "
                f"{self._job.version}. Install the same on all machines of the cluster."
            )
        from minigpt4_runtime.api import MiniGPT4

        self._model = MiniGPT4.load(**self._job.model)

    def describe(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The records of these images, as mappings, in this order.

        Raises:
            MiniGPT4Error: nothing can be described, for example with this schema or task.
        """
        job = self._job
        sources = sources_of(
            names, folder=job.folder, column=job.column, allows_local=job.allows_local
        )
        found = dict(ask_about(names, sources, self._ask))
        return [asdict(found[index]) for index in range(len(names))]

    def _ask(self, sources: list[ImageSource]) -> Iterator[Described]:
        assert self._model is not None, "load comes first"
        job = self._job
        return self._model.describe_all(sources, job.prompt, job.sampling, task=job.task)
