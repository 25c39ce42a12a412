"""What one model needs, brought here: looked for, asked for, weighed, downloaded, put together.

Owns   the FetchPlan, the room on the disk and in memory, and the lock on the cache.
Takes  ModelSources and a user's wishes; gives PublishedFiles for a conversion.
Never  converts, and never touches the files of --from.
"""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from filelock import FileLock, Timeout

from minigpt4_runtime.backend.registry import open_device
from minigpt4_runtime.checkpoint import shelf
from minigpt4_runtime.checkpoint.convert import PublishedFiles
from minigpt4_runtime.checkpoint.expected import check_language_sizes
from minigpt4_runtime.checkpoint.file_kind import read_json
from minigpt4_runtime.checkpoint.folder import check_target
from minigpt4_runtime.checkpoint.manifest import SourceRecord
from minigpt4_runtime.checkpoint.recognise import Found, match_parts
from minigpt4_runtime.checkpoint.shelf import downloads_dir, home_dir
from minigpt4_runtime.checkpoint.sizes import running_bytes, weight_bytes
from minigpt4_runtime.checkpoint.sources import ModelSources, Part, SourceFile
from minigpt4_runtime.checkpoint.weights import show_bytes
from minigpt4_runtime.config import DTypeName
from minigpt4_runtime.errors import BackendUnavailableError, CheckpointError, ConfigError
from minigpt4_runtime.hub.crew import run_jobs
from minigpt4_runtime.hub.download import (
    PARTIAL_SUFFIX,
    Watch,
    describe_failure,
    download,
    hash_file,
    refuse_other_file,
)
from minigpt4_runtime.hub.hosts import Hiccup, Refusal, find_address, open_client, open_reply
from minigpt4_runtime.hub.ledger import Ledger

if TYPE_CHECKING:
    from httpx2 import Client

_GIB = 2**30
_LINKS_PREFIX = ".links-"


class Progress(Protocol):
    """Hears how far each file is. Called from several threads."""

    def __call__(self, title: str, num_bytes: int, total_bytes: int | None) -> None:
        """`num_bytes` more of the `total_bytes` of this file are here."""
        ...


@dataclass(frozen=True)
class PlannedFile:
    """A file that has to come from a host. `kept_bytes` of it are here from an earlier run."""

    part: Part
    file: SourceFile
    target: Path
    host: str
    size: int | None
    kept_bytes: int

    @property
    def title(self) -> str:
        """What a person sees of it: two files may have one name."""
        return f"{self.part.name}/{self.file.name}"

    @property
    def missing_bytes(self) -> int:
        """What is left to download, as far as a size is known."""
        return max(0, (self.size or 0) - self.kept_bytes)


@dataclass(frozen=True)
class FetchPlan:
    """What comes from where. `local` has the files of --from, for the parts that it holds."""

    model: ModelSources
    local: Mapping[Part, Found]
    files: tuple[PlannedFile, ...]
    out_dir: Path
    dtype: DTypeName | None

    @property
    def is_size_known(self) -> bool:
        """Whether every host has said how large its files are."""
        return all(each.size is not None for each in self.files)

    @property
    def download_bytes(self) -> int:
        """What is left to download."""
        return sum(each.missing_bytes for each in self.files)

    @property
    def source_bytes(self) -> list[int]:
        """The sizes of all files that the model will be made of."""
        paths = [path for found in self.local.values() for path in found.files.values()]
        return [path.stat().st_size for path in paths] + [each.size or 0 for each in self.files]

    @property
    def model_bytes(self) -> int:
        """What the model folder takes, at most; without a preset, as far as sizes are known."""
        if self.dtype is not None and self.model.preset is not None:
            return weight_bytes(self.model.preset, self.dtype)
        num_bytes = sum(self.source_bytes) * (2 if self.dtype == "float32" else 1)
        if self.model.preset is not None and not self.is_size_known:
            return max(num_bytes, weight_bytes(self.model.preset, "float16"))
        return num_bytes

    @property
    def smallest_running_bytes(self) -> int:
        """What the model takes in memory while it answers, in half precision."""
        if self.model.preset is not None:
            return running_bytes(self.model.preset, "float16")
        return sum(self.source_bytes)


@contextmanager
def cache_lock() -> Iterator[None]:
    """Keep a second fetch out of the cache as long as this lasts.

    Raises:
        CheckpointError: another one is at work there, or the cache cannot be written.
    """
    # The system lets go of it when its process dies, however it dies.
    lock = FileLock(home_dir() / ".fetch.lock", timeout=0)
    try:
        downloads_dir().mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"Another `minigpt4 fetch` is at work in {home_dir()}. Wait for it, or set "
            "MINIGPT4_HOME to another folder."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{home_dir()} cannot be written ({error.strerror}). Set MINIGPT4_HOME to a folder "
            "that can."
        ) from None
    try:
        for left_behind in downloads_dir().glob(f"{_LINKS_PREFIX}*"):
            shutil.rmtree(left_behind, ignore_errors=True)
        shelf.clear_remains()
        yield
    finally:
        lock.release()


def make_plan(
    model: ModelSources,
    *,
    out_dir: Path,
    from_dir: Path | None,
    dtype: DTypeName | None,
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
        ledger = Ledger(home_dir())
        with open_client() as client:
            jobs = [partial(_plan_file, client, ledger, part, file) for part, file in wanted]
            files = run_jobs(jobs, stop=threading.Event())
    return FetchPlan(model, local, tuple(files), out_dir, dtype)


def _plan_file(client: "Client", ledger: Ledger, part: Part, file: SourceFile) -> PlannedFile:
    target = downloads_dir() / part.name / file.name
    first = ledger.first_arrival(file)
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
            # The download itself is patient; what it will bring is known then.
            return PlannedFile(part, file, target, address.host, file.size, kept_bytes)
        except Refusal as refusal:
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
    converting_bytes = max(plan.source_bytes, default=0) + _GIB
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
    """In which dtype a model answers here: the device's own, or a half where that is too large.

    `half_bytes` is what it takes in half precision; float32 is twice that.
    """
    device = open_device("auto")
    free, dtype = device.free_memory_bytes(), device.facts.default_dtype
    if dtype == "float32" and free is not None and free < 2 * half_bytes:
        return "float16"
    return dtype


def bring_files(plan: FetchPlan, progress: Progress | None, say: Callable[[str], None]) -> None:
    """Download what is missing, several files at once, and check what is here from before.

    `say` is told whenever a host has to be waited for.

    Raises:
        CheckpointError: a file cannot be had; what came of the others is kept.
    """
    ledger, stop = Ledger(home_dir()), threading.Event()
    if not plan.files:
        return
    # The small ones first: what is wrong with them should not be found after hours.
    files = sorted(plan.files, key=lambda each: each.size or 0)
    with open_client() as client:

        def bring(each: PlannedFile) -> None:
            watch = Watch(_bytes_of(each, progress), say, stop)
            _bring_file(client, ledger, each, watch)
            _refuse_other_model(plan.model, ledger, each)

        run_jobs([partial(bring, each) for each in files], stop=stop)


def _bytes_of(each: PlannedFile, progress: Progress | None) -> Callable[[int], None]:
    def show(num_bytes: int) -> None:
        if progress is not None:
            progress(each.title, num_bytes, each.size)

    return show


def _bring_file(client: "Client", ledger: Ledger, each: PlannedFile, watch: Watch) -> None:
    watch.on_bytes(0)
    each.target.parent.mkdir(parents=True, exist_ok=True)
    if each.target.is_file():
        size, sha256 = hash_file(each.target, watch)
        if sha256 == ledger.expected_sha256(each.file):
            return
        # It was whole when it got its name: the disk, or someone, has changed it since.
        each.target.unlink()
        watch.on_bytes(-size)
    download(each.file, each.target, client=client, ledger=ledger, watch=watch)


def _refuse_other_model(model: ModelSources, ledger: Ledger, each: PlannedFile) -> None:
    """Another model shows in the language model's settings, long before its weights are here."""
    if model.preset is None or each.part.role != "language" or each.file.name != "config.json":
        return
    where = f"{each.file.name} from {each.host}"
    try:
        check_language_sizes(where, read_json(each.target), model.preset)
    except CheckpointError as error:
        ledger.forget(each.file)
        each.target.unlink()
        raise CheckpointError(
            f"{error} Look at what HF_ENDPOINT and --sources name, or give the right files with "
            "--from DIR."
        ) from None


@contextmanager
def assembled(plan: FetchPlan) -> Iterator[PublishedFiles]:
    """Give all files under their published names in one folder of links, as long as this lasts.

    Raises:
        CheckpointError: what a conversion says of the links is said of the files themselves.
    """
    links: dict[Path, Path] = {}
    with tempfile.TemporaryDirectory(dir=downloads_dir(), prefix=_LINKS_PREFIX) as name:
        for part in plan.model.parts:
            (Path(name) / part.role).mkdir()
            local = plan.local[part].files if part in plan.local else {}
            downloaded = {each.file.name: each.target for each in plan.files if each.part == part}
            for file_name, path in {**downloaded, **local}.items():
                # A conversion looks for BERT's settings under this name alone.
                link_name = "config.json" if part.role == "bert" else file_name
                links[Path(name) / part.role / link_name] = path.resolve()
        for link, path in links.items():
            _link(path, link)
        places = {link.parent.name: link for link in links}
        try:
            yield PublishedFiles(
                language_dir=places["language"].parent,
                vision=places["vision"],
                projection=places["projection"],
                qformer=places.get("qformer"),
                bert_dir=places["bert"].parent if "bert" in places else None,
                preset=plan.model.preset,
            )
        except CheckpointError as error:
            message = str(error)
            _forget_refused(plan, message, links)
            for link, path in links.items():
                message = message.replace(str(link), str(path))
            if plan.files:
                message += (
                    f" What was downloaded is kept in {downloads_dir()}; "
                    "`minigpt4 models --delete downloads` makes the next fetch begin anew."
                )
            raise CheckpointError(message) from None


def _forget_refused(plan: FetchPlan, message: str, links: Mapping[Path, Path]) -> None:
    """Take the downloads that a conversion's message names for no first arrivals.

    Where it names a part's folder, all files of that part are meant.
    """
    named = {path for link, path in links.items() if str(link) in message}
    if not named:
        named = {path for link, path in links.items() if str(link.parent) in message}
    ledger = Ledger(home_dir())
    for each in plan.files:
        if each.target.resolve() in named:
            ledger.forget(each.file)


def _link(path: Path, link: Path) -> None:
    """A symbolic link, or what Windows allows without special rights."""
    try:
        link.symlink_to(path)
    except OSError:
        try:
            os.link(path, link)
        except OSError:
            shutil.copyfile(path, link)


def discard_sources(plan: FetchPlan) -> None:
    """Delete what was downloaded for this model."""
    for each in plan.files:
        each.target.unlink(missing_ok=True)
    for folder in {each.target.parent for each in plan.files}:
        if not any(folder.iterdir()):
            folder.rmdir()


def name_strangers(plan: FetchPlan, records: Iterable[SourceRecord]) -> list[str]:
    """The files of --from that are others than the published ones, as far as a digest is known."""
    ledger, found = Ledger(home_dir()), {record.sha256 for record in records}
    return [
        f"{part.what}: {file.name}"
        for part, local in plan.local.items()
        for file in part.files
        # Of an index nothing is in the model.
        if local.files
        and not file.name.endswith(".index.json")
        and (ledger.expected_sha256(file) or "") not in {"", *found}
    ]
