"""The plan of a fetch: which files a model needs, from which hosts, and whether there is room.

Owns   the FetchPlan, and the checks of disk and memory.
Takes  ModelSources and a user's options; gives a FetchPlan.
Never  downloads a file, and never touches those of --from.
"""

import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4_runtime.checkpoint.folder import check_target
from minigpt4_runtime.checkpoint.shelf import downloads_dir, home_dir
from minigpt4_runtime.checkpoint.sizes import running_bytes, weight_bytes
from minigpt4_runtime.checkpoint.sources import ModelSources, PublishedPart, SourceFile
from minigpt4_runtime.checkpoint.weights import show_bytes
from minigpt4_runtime.config import DTypeName, ModelConfig
from minigpt4_runtime.convert.recognise import Found, match_parts
from minigpt4_runtime.devices.registry import open_device
from minigpt4_runtime.errors import BackendUnavailableError, CheckpointError, ConfigError
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.formats.registry import FormatChoice
from minigpt4_runtime.hub.crew import run_jobs
from minigpt4_runtime.hub.download import PARTIAL_SUFFIX, describe_failure, refuse_other_file
from minigpt4_runtime.hub.download_record import DownloadRecord
from minigpt4_runtime.hub.hosts import Hiccup, HostRefusal, find_address, open_client, open_reply
from minigpt4_runtime.presets import PRESETS

if TYPE_CHECKING:
    from httpx2 import Client

_GIB = 2**30


@dataclass(frozen=True)
class PlannedFile:
    """A file that has to come from a host. `kept_bytes` of it are here from an earlier run."""

    part: PublishedPart
    file: SourceFile
    target: Path
    host: str
    size: int | None
    kept_bytes: int

    @property
    def title(self) -> str:
        """Its name on the screen, with the part: two files may have one name."""
        return f"{self.part.name}/{self.file.name}"


@dataclass(frozen=True)
class FetchPlan:
    """The files to download, and in `local` the files of --from for the parts found there."""

    model: ModelSources
    local: Mapping[PublishedPart, Found]
    files: tuple[PlannedFile, ...]
    out_dir: Path
    dtype: DTypeName | None
    choose_formats: Callable[[ModelConfig], FormatChoice] | None = None

    @property
    def is_size_known(self) -> bool:
        """Whether every host has said how large its files are."""
        return all(each.size is not None for each in self.files)

    @property
    def download_bytes(self) -> int:
        """How many bytes are left to download, as far as sizes are known."""
        return sum(max(0, (each.size or 0) - each.kept_bytes) for each in self.files)

    @property
    def source_sizes(self) -> list[int]:
        """The sizes of all files that the model will be made of."""
        paths = [path for found in self.local.values() for path in found.files.values()]
        return [path.stat().st_size for path in paths] + [each.size or 0 for each in self.files]

    @property
    def formats(self) -> FormatChoice | None:
        """The formats of its weights where they are not floats and its shape is known."""
        if self.choose_formats is None or self.model.preset is None:
            return None
        return self.choose_formats(PRESETS[self.model.preset])

    @property
    def model_bytes(self) -> int:
        """The largest size of the model folder; without a preset, as far as sizes are known."""
        if self.formats is not None and self.model.preset is not None:
            return weight_bytes(self.model.preset, self.dtype or "float32", self.formats)
        if self.dtype is not None and self.model.preset is not None:
            return weight_bytes(self.model.preset, self.dtype)
        num_bytes = sum(self.source_sizes) * (2 if self.dtype == "float32" else 1)
        if self.model.preset is not None:
            num_bytes += _merged_bytes(PRESETS[self.model.preset])
        if self.model.preset is not None and not self.is_size_known:
            return max(num_bytes, weight_bytes(self.model.preset, "float16"))
        return num_bytes

    @property
    def smallest_running_bytes(self) -> int:
        """The memory that the model takes while it answers, in half precision."""
        if self.model.preset is not None:
            return running_bytes(self.model.preset, "float16", self.formats or DENSE.name)
        return sum(self.source_sizes)


def _merged_bytes(config: ModelConfig) -> int:
    """How much float16 weights grow where LoRA's float32 is merged into queries and values."""
    language = config.language
    merged = 2 * language.num_hidden_layers * language.hidden_size**2
    return 2 * merged if config.template == "minigptv2" else 0


def make_plan(
    model: ModelSources,
    *,
    out_dir: Path,
    from_dir: Path | None,
    dtype: DTypeName | None,
    choose_formats: Callable[[ModelConfig], FormatChoice] | None = None,
    say: Callable[[str], None],
) -> FetchPlan:
    """Look for files, and ask the hosts for the sizes of the others.

    `say` is told of files of --from that cannot be used.

    Raises:
        CheckpointError: no host gives a file, --from holds two, or `out_dir` cannot be made.
        ConfigError: `out_dir` is where the cache lies.
    """
    if home_dir().resolve().is_relative_to(out_dir.resolve()):
        raise ConfigError(f"--out is {out_dir}, which holds the cache. Choose another folder.")
    check_target(out_dir, force=False)
    if choose_formats is not None and model.preset is not None:
        choose_formats(PRESETS[model.preset])  # Refused before hours of downloading.
    local = {} if from_dir is None else match_parts(model, from_dir, say)
    nothing = Found({}, is_whole=False)
    wanted = [
        (part, file)
        for part in model.parts
        for file in part.files
        if not (found := local.get(part, nothing)).is_whole and file.name not in found.files
    ]
    files: list[PlannedFile] = []
    if wanted:
        downloads = DownloadRecord(home_dir())
        with open_client() as client:
            jobs = [partial(_plan_file, client, downloads, part, file) for part, file in wanted]
            files = run_jobs(jobs, stop=threading.Event())
    return FetchPlan(model, local, tuple(files), out_dir, dtype, choose_formats)


def _plan_file(
    client: "Client", downloads: DownloadRecord, part: PublishedPart, file: SourceFile
) -> PlannedFile:
    target = downloads_dir() / part.name / file.name
    first = downloads.first_arrival(file)
    if target.is_file() and first is not None:
        size = target.stat().st_size
        return PlannedFile(part, file, target, first.host, size, size)
    beside = target.with_name(target.name + PARTIAL_SUFFIX)
    kept_bytes = beside.stat().st_size if beside.is_file() else 0
    failures, addresses = [], [find_address(place) for place in file.hosts]
    for address in addresses:
        try:
            with open_reply(client, address) as reply:
                refuse_other_file(file, reply)
                known = file.size or reply.size
                return PlannedFile(part, file, target, address.host, known, kept_bytes)
        except Hiccup:
            # The download itself tries again, and learns the size then.
            return PlannedFile(part, file, target, address.host, file.size, kept_bytes)
        except HostRefusal as refusal:
            failures.append(f"{address.host}: {refusal}")
    raise CheckpointError(describe_failure(file, addresses, failures))


def check_room(plan: FetchPlan, *, will_answer: bool) -> None:
    """Make sure that disk and memory suffice, before anything begins.

    Raises:
        CheckpointError: the disk has too little room; the message says how much is missing.
        BackendUnavailableError: so has the memory.
    """
    needs: dict[int, tuple[Path, int]] = {}
    for folder, num_bytes in (
        (downloads_dir(), plan.download_bytes),
        (plan.out_dir.resolve().parent, plan.model_bytes),
    ):
        there = next(each for each in (folder, *folder.parents) if each.exists())
        disk = there.stat().st_dev
        needs[disk] = (there, needs.get(disk, (there, 0))[1] + num_bytes)
    for there, num_bytes in needs.values():
        free = shutil.disk_usage(there).free
        if free < num_bytes:
            raise CheckpointError(
                f"The disk of {there} has no room: {plan.model.name} needs "
                f"{show_bytes(num_bytes)} there while it is made, {show_bytes(free)} are free and "
                f"{show_bytes(num_bytes - free)} are missing. Free them, or choose another --out "
                "or MINIGPT4_HOME."
            )
    _check_memory(plan, will_answer=will_answer)


def _check_memory(plan: FetchPlan, *, will_answer: bool) -> None:
    free = open_device("cpu").free_memory_bytes()
    converting_bytes = max(plan.source_sizes, default=0) + _GIB
    if free is not None and free < converting_bytes:
        raise BackendUnavailableError(
            f"Converting {plan.model.name} needs {show_bytes(converting_bytes)} of memory, "
            f"{show_bytes(free)} are free and {show_bytes(converting_bytes - free)} are missing. "
            "Free them, or fetch it on another machine."
        )
    device = open_device("auto")
    free, needed = device.free_memory_bytes(), plan.smallest_running_bytes
    if will_answer and free is not None and free < needed:
        raise BackendUnavailableError(
            f"{plan.model.name} needs {show_bytes(needed)} of memory to answer, {device.device} "
            f"has {show_bytes(free)} free and {show_bytes(needed - free)} are missing. Free them, "
            "or add --no-example to fetch it for another machine."
        )


def choose_dtype(half_bytes: int) -> DTypeName:
    """The dtype for a model here: the device's default, or float16 if float32 is too large.

    `half_bytes` is its memory in half precision; float32 takes twice that.
    """
    device = open_device("auto")
    free, dtype = device.free_memory_bytes(), device.facts.default_dtype
    if dtype == "float32" and free is not None and free < 2 * half_bytes:
        return "float16"
    return dtype
