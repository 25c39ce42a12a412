"""Where uploaded pictures lie: in a folder of this user's alone, for as long as there is a page."""

import asyncio
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
from minigpt4_runtime.web.uploads import Asked, Uploads

# Gradio and what it stands on warn of their own.
pytestmark = pytest.mark.filterwarnings("default")


async def upload_to_a_page() -> tuple[Path, Path, int]:
    """Show a page and upload a picture; gives where it lay, where uploads did, and their mode."""
    app = FastAPI()
    # Within a running event loop: without one Gradio makes some, and closes none.
    with chat_page(app, "http://127.0.0.1:1", (), pictures=PICTURES):
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
    with pytest.raises(gradio.Error, match="Upload it again"):
        uploads.find(str(folder / name))
    with pytest.raises(gradio.Error, match="Upload it again"):
        uploads.read({"text": "What?", "files": [str(folder / name)]})
    assert uploads.read(None) == Asked()
