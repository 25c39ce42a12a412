"""Where uploaded pictures lie: in a folder of this user's alone, for as long as there is a page."""

import asyncio
import contextlib
import errno
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import gradio
import httpx
import pytest
from fastapi import FastAPI
from page_server import PICTURES

from minigpt4_runtime.cli.web import chat_page
from minigpt4_runtime.web import guard
from minigpt4_runtime.web.upload_room import UploadRoom
from minigpt4_runtime.web.uploads import QuestionBox, Uploads

# Gradio and what it stands on warn of their own.
pytestmark = pytest.mark.filterwarnings("default")


async def upload_to_a_page() -> tuple[Path, Path, int]:
    """Show a page and upload a picture; gives where it lay, where uploads did, and their mode."""
    app = FastAPI()
    # Within a running event loop: without one Gradio makes some, and closes none.
    with chat_page(app, "http://127.0.0.1:1", (), examples_dir=PICTURES):
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            files = {"files": ("a.png", (PICTURES / "one.png").read_bytes())}
            (path,) = (await client.post("/gradio_api/upload", files=files)).json()
            assert (await client.get(f"/gradio_api/file={path}")).status_code == 200
        return Path(path), folder, stat.S_IMODE(folder.stat().st_mode)


def test_nobody_else_reads_uploads_and_nothing_is_left(monkeypatch):
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    path, folder, mode = asyncio.run(upload_to_a_page())
    assert path.is_relative_to(folder)
    assert mode == 0o700
    assert not folder.exists()
    assert "GRADIO_TEMP_DIR" not in os.environ


def test_a_folder_of_the_user_s_own_is_used_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "mine"))
    path, folder, _ = asyncio.run(upload_to_a_page())
    assert folder == tmp_path / "mine"
    assert path.is_relative_to(folder)
    assert path.is_file()
    assert os.environ["GRADIO_TEMP_DIR"] == str(folder)


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "", "b.png", "a\0b", "a" * 5000])
def test_what_was_not_uploaded_is_not_found(tmp_path, name):
    (tmp_path / "a.png").touch()
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "a.png").touch()
    uploads = Uploads(SimpleNamespace(GRADIO_CACHE=str(folder)))
    assert uploads.find(str(folder / "a.png")) == folder / "a.png"
    assert uploads.find(str(folder / name)) is None
    with pytest.raises(gradio.Error, match="Upload it again"):
        uploads.read({"text": "What?", "files": [str(folder / name)]})
    assert uploads.read(None) == QuestionBox()


# --- what is sent and not kept ------------------------------------------------------------------

SMALL = 2 * 2**20
LARGE = b"x" * (SMALL // 2)
FILES = {"files": ("a.png", LARGE)}


@contextlib.asynccontextmanager
async def a_page(folder, monkeypatch, **limits):
    """A page whose uploads lie in `folder`, and a client of it."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    app = FastAPI()
    with chat_page(app, "http://127.0.0.1:1", (), examples_dir=PICTURES, **limits):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            before = set(folder.rglob("*"))
            yield app, client, lambda: [each for each in folder.rglob("*")
                                        if each.is_file() and each not in before]  # fmt: skip


def test_uploads_are_limited_in_total(monkeypatch, tmp_path):
    async def run():
        async with a_page(tmp_path, monkeypatch, max_kept_bytes=SMALL) as (_, client, kept):
            for name, status in (("a.png", 200), ("b.png", 507), ("c.png", 507)):
                files = {"files": (name, LARGE)}
                answer = await client.post("/gradio_api/upload", files=files)
                assert answer.status_code == status
            assert "keeps 2 MiB of pictures" in answer.text
            assert len(kept()) == 1
            small = {"files": ("small.png", b"x")}
            assert (await client.post("/gradio_api/upload", files=small)).status_code == 200

    asyncio.run(run())


def test_a_full_disk_is_said_and_nothing_of_the_picture_stays(monkeypatch, tmp_path):
    class FullDisk:
        def __init__(self, file):
            self.file, self.name = file, file.name

        def write(self, content):
            self.file.write(content[:10])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            self.file.close()

    real = gradio.route_utils.NamedTemporaryFile

    async def run():
        async with a_page(tmp_path, monkeypatch) as (_, client, kept):
            with monkeypatch.context() as patch:
                patch.setattr(
                    gradio.route_utils, "NamedTemporaryFile", lambda **how: FullDisk(real(**how))
                )
                answer = await client.post("/gradio_api/upload", files=FILES)
            assert (answer.status_code, kept()) == (507, [])
            assert "disk is full" in answer.text
            assert (await client.post("/gradio_api/upload", files=FILES)).status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize("ending", ["silence", "disconnect"])
@pytest.mark.parametrize("path", ["upload", "queue/join"])
def test_what_is_never_sent_is_given_up_and_not_kept(monkeypatch, tmp_path, path, ending):
    monkeypatch.setattr(guard, "_UPLOAD_SECONDS", 0.2)
    monkeypatch.setattr(guard, "_EVENT_SECONDS", 0.2)
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    sent = []

    async def run():
        async with a_page(tmp_path, monkeypatch) as (app, _, kept):
            coming = [{"type": "http.request", "body": head + b"x" * 1000, "more_body": True}]

            async def receive():
                if coming:
                    return coming.pop()
                if ending == "silence":
                    await asyncio.Event().wait()
                return {"type": "http.disconnect"}

            async def send(message):
                sent.append(message)

            headers = [(b"host", b"localhost"), (b"content-length", b"9999"),
                       (b"content-type", b"multipart/form-data; boundary=b")]  # fmt: skip
            scope = {"type": "http", "method": "POST", "path": f"/gradio_api/{path}",
                     "raw_path": b"", "query_string": b"", "headers": headers, "root_path": "",
                     "scheme": "http", "server": ("localhost", 80),
                     "http_version": "1.1"}  # fmt: skip
            await app(scope, receive, send)
            assert kept() == []

    asyncio.run(run())
    if ending == "silence":
        assert sent[0]["status"] == 408
        assert b"did not arrive within" in sent[1]["body"]


def test_uploads_count_until_they_are_deleted():
    now = [0.0]
    room = UploadRoom(max_bytes=100_000, seconds=60, clock=lambda: now[0])
    first, second = room.begin(), room.begin()
    assert room.add(first, 60_000)
    assert not room.add(second, 60_000)
    room.forget(second)
    now[0] = 59
    assert not room.add(room.begin(), 60_000)
    now[0] = 61
    assert room.add(room.begin(), 20_000)
    room.forget(first)  # Of old; it does not count twice.
    assert not room.add(room.begin(), 50_000)
