"""Where uploaded pictures lie: in a folder of this user's alone, for as long as there is a page."""

import os
import stat
from pathlib import Path

import pytest
from fastapi import FastAPI
from page_server import PICTURES
from starlette.testclient import TestClient

from minigpt4_runtime.cli.web import chat_page

# Gradio and what it stands on warn of their own.
pytestmark = pytest.mark.filterwarnings("default")


def upload(app):
    """Upload a picture; gives where it lies."""
    files = {"files": ("a.png", (PICTURES / "one.png").read_bytes())}
    with TestClient(app) as client:
        (path,) = client.post("/gradio_api/upload", files=files).json()
        assert client.get(f"/gradio_api/file={path}").status_code == 200
    return Path(path)


def test_nobody_else_reads_uploads_and_nothing_is_left(monkeypatch):
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    app = FastAPI()
    with chat_page(app, "http://127.0.0.1:1", (), pictures=PICTURES):
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert upload(app).is_relative_to(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists()
    assert "GRADIO_TEMP_DIR" not in os.environ


def test_a_folder_of_the_user_s_own_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "mine"))
    app = FastAPI()
    with chat_page(app, "http://127.0.0.1:1", (), pictures=PICTURES):
        assert upload(app).is_relative_to(tmp_path / "mine")
    assert (tmp_path / "mine").exists()
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path / "mine")
