"""The examples of docs/serving.md run as they stand there."""

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from running import ROOT

TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE))
ANSWER = "There are three shapes"
REFERENCE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
REFERENCE = REFERENCE.partition("\n## minigpt4 serve\n")[2].partition("\n## ")[0]


def run(server, command, code):
    done = subprocess.run(
        command, input=code, capture_output=True, encoding="utf-8", cwd=ROOT, timeout=60,
        env=os.environ | {"URL": server.url}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl(server):
    answer = json.loads(run(server, ["sh"], BLOCKS["sh"]))
    assert ANSWER in answer["choices"][0]["message"]["content"]


def test_python(server):
    assert ANSWER in run(server, [sys.executable, "-"], BLOCKS["python"])


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_javascript(server):
    assert ANSWER in run(server, ["node", "-"], BLOCKS["js"])


@pytest.mark.parametrize(
    ("client", "package"),
    [
        ("openai for Python", "openai"), ("LangChain (`langchain-openai`)", "langchain-openai"),
        ("Pydantic AI", "pydantic-ai-slim"), ("simonw/llm", "llm"),
    ],
)  # fmt: skip
def test_the_clients_that_were_tried_are_those_of_the_tests(client, package):
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (version,) = [line.partition("==")[2] for line in pinned if line.startswith(f"{package}==")]
    assert f"| {client} | {version} |" in TEXT


def test_the_unit_can_be_read_and_starts_a_server_that_failed_again():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read_string(BLOCKS["ini"])
    assert unit["Service"]["Restart"] == "on-failure"
    assert shlex.split(unit["Service"]["ExecStart"])[1] == "serve"


def test_every_flag_that_is_named_exists():
    flags = set(re.findall(r"(?<!\S)`?(--[a-z][a-z-]+)", TEXT))
    assert flags
    for flag in flags:
        assert f"`{flag}" in REFERENCE, flag
