"""The examples of Ray run, in processes of their own, as their docstrings say."""

import importlib.util
import json
import os
import secrets
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ray


@pytest.fixture
def environment():
    """What a process needs to find the package; without a token Ray would keep one at home."""
    spec = importlib.util.find_spec("minigpt4_runtime")
    path = str(Path(spec.origin).parents[1])
    token = secrets.token_hex(32)
    return os.environ | {
        "PYTHONPATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token,
    }  # fmt: skip


def test_ray_data_describes_a_folder(tmp_path, environment):
    from pyarrow import parquet

    command = [sys.executable, "examples/ray_describe.py", "examples/images", str(tmp_path / "out")]
    # A pipeline whose workers take all CPUs reads nothing and waits for ever.
    subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300
    )  # fmt: skip
    rows = parquet.read_table(tmp_path / "out").to_pylist()
    answers = {Path(row["path"]).name: row["answer"] for row in rows}
    assert sorted(answers) == ["four.png", "one.png", "three.png", "two.png"]
    assert answers["three.png"].startswith("There are three shapes")


def test_ray_serve_answers(environment):
    command = [sys.executable, "examples/ray_serve.py"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True,
    ) as serving:  # fmt: skip
        try:
            for line in serving.stderr:
                if "is ready at" in line:
                    break
            else:
                pytest.fail("it ended before it was ready")
            body = {"model": "minigpt4", "messages": [{"role": "user", "content": "Hello?"}]}
            request = urllib.request.Request(
                "http://127.0.0.1:8000/v1/chat/completions", json.dumps(body).encode(),
                {"Content-Type": "application/json", "x-session-id": "a"},
            )  # fmt: skip
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["choices"][0]["finish_reason"] == "stop"
        finally:
            serving.terminate()
            serving.communicate(timeout=60)
