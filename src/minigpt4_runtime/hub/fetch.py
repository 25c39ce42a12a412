"""The files of a FetchPlan, downloaded and put together for a conversion.

Owns   the lock on the cache, and the deletion of files that were refused or are no longer needed.
Takes  a FetchPlan; gives PublishedFiles.
Never  converts, and never touches the files of --from.
"""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from filelock import FileLock, Timeout

from minigpt4_runtime.checkpoint.file_kind import read_json
from minigpt4_runtime.checkpoint.manifest import SourceRecord
from minigpt4_runtime.checkpoint.shelf import clear_remains, downloads_dir, home_dir
from minigpt4_runtime.checkpoint.sources import ModelSources
from minigpt4_runtime.checkpoint.weights import show_bytes
from minigpt4_runtime.convert.convert import PublishedFiles
from minigpt4_runtime.convert.expected import check_language_sizes
from minigpt4_runtime.errors import CheckpointError
from minigpt4_runtime.hub.crew import run_jobs
from minigpt4_runtime.hub.download import Watch, download, hash_file
from minigpt4_runtime.hub.download_record import DownloadRecord
from minigpt4_runtime.hub.fetch_plan import FetchPlan, PlannedFile
from minigpt4_runtime.hub.hosts import open_client

if TYPE_CHECKING:
    from httpx2 import Client

_LINKS_PREFIX = ".links-"


class FileProgress(Protocol):
    """Receives the progress of each file, from several threads."""

    def __call__(self, title: str, num_bytes: int, total_bytes: int | None) -> None:
        """`num_bytes` more of the `total_bytes` of this file are here."""


@contextmanager
def cache_lock() -> Iterator[None]:
    """Keep every other fetch, and conversions into the cache, out of it as long as this lasts.

    Raises:
        CheckpointError: one of them is at work there, or the cache cannot be written.
    """
    # The system releases it when its process ends in any way.
    lock = FileLock(home_dir() / ".fetch.lock", timeout=0)
    try:
        downloads_dir().mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"Another `minigpt4 fetch` or `convert` is at work in {home_dir()}. Wait for it, or "
            "take another folder: MINIGPT4_HOME moves the cache, --out a model."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{home_dir()} cannot be written ({error.strerror}). Set MINIGPT4_HOME to a folder "
            "that can."
        ) from None
    try:
        for left_behind in downloads_dir().glob(f"{_LINKS_PREFIX}*"):
            shutil.rmtree(left_behind, ignore_errors=True)
        clear_remains()
        yield
    finally:
        lock.release()


def bring_files(plan: FetchPlan, progress: FileProgress, say: Callable[[str], None]) -> None:
    """Download missing files, several at once, and check the files of earlier runs.

    `say` is told of each file that is here, and whenever a host has to be waited for.

    Raises:
        CheckpointError: no host gives a file; the other downloads are kept.
    """
    downloads = DownloadRecord(home_dir())
    if not plan.files:
        return
    # Settings first: an error in them should not show after hours.
    settings = [each for each in plan.files if each.file.name.endswith(".json")]
    others = [each for each in plan.files if not each.file.name.endswith(".json")]
    with open_client() as client:

        def bring(each: PlannedFile, stop: threading.Event) -> None:
            watch = Watch(lambda size: progress(each.title, size, each.size), say, stop)
            _bring_file(client, downloads, each, watch)
            _refuse_other_model(plan.model, downloads, each)
            if not stop.is_set():  # Else the caller has already said why it stops.
                say(f"{each.title}: {show_bytes(each.target.stat().st_size)}, all is here.")

        for files in (settings, others):
            stop = threading.Event()
            run_jobs([partial(bring, each, stop) for each in files], stop=stop)


def _bring_file(
    client: "Client", downloads: DownloadRecord, each: PlannedFile, watch: Watch
) -> None:
    watch.on_bytes(0)
    each.target.parent.mkdir(parents=True, exist_ok=True)
    if each.target.is_file():
        size, sha256 = hash_file(each.target, watch)
        if sha256 == downloads.expected_sha256(each.file):
            return
        # The file was complete when it got its name, so it was changed since.
        each.target.unlink()
        watch.on_bytes(-size)
    download(each.file, each.target, client=client, downloads=downloads, watch=watch)


def _refuse_other_model(model: ModelSources, downloads: DownloadRecord, each: PlannedFile) -> None:
    """Check the language model's settings before its weights are downloaded."""
    if model.preset is None or each.part.role != "language" or each.file.name != "config.json":
        return
    where = f"{each.file.name} from {each.host}"
    try:
        check_language_sizes(where, read_json(each.target), model.preset)
    except CheckpointError as error:
        downloads.forget(each.file)
        each.target.unlink()
        raise CheckpointError(
            f"{error} Look at what HF_ENDPOINT and --sources name, or give the right files with "
            "--from DIR."
        ) from None


@contextmanager
def assembled(plan: FetchPlan) -> Iterator[PublishedFiles]:
    """Give all files under their published names in one temporary folder of links.

    Raises:
        CheckpointError: the conversion failed; the message names the files, not the links.
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
    """Drop the records of the downloads that a conversion's message names.

    If it names a part's folder, all files of that part are meant.
    """
    named = {path for link, path in links.items() if str(link) in message}
    if not named:
        named = {path for link, path in links.items() if str(link.parent) in message}
    downloads = DownloadRecord(home_dir())
    for each in plan.files:
        if each.target.resolve() in named:
            downloads.forget(each.file)


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
    """The files of --from that differ from the published ones, as far as a digest is known."""
    downloads, found = DownloadRecord(home_dir()), {record.sha256 for record in records}
    return [
        f"{part.what}: {file.name}"
        for part, local in plan.local.items()
        for file in part.files
        # An index leaves nothing in the model.
        if local.files
        and not file.name.endswith(".index.json")
        and (downloads.expected_sha256(file) or "") not in {"", *found}
    ]
