"""docs/cli.md says what the commands say."""

import importlib.util
from pathlib import Path

import pytest
import typer

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "write_cli_docs.py"
CONSTRAINTS = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
pytestmark = pytest.mark.skipif(
    f"typer=={typer.__version__}\n" not in CONSTRAINTS,
    reason="docs/cli.md is made with the Typer of constraints.txt",
)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("write_cli_docs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(script):
    written = script.DOCS_PATH.read_text(encoding="utf-8")
    assert written == script.write_docs(), "run: python scripts/write_cli_docs.py"


def test_the_page_names_every_option(script):
    page = script.write_docs()
    for option in ("--resume", "--max-new-tokens COUNT", "--check", "--verify", "-r", "--version"):
        assert f"`{option}`" in page
