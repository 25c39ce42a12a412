"""A few drawn scenes as training data."""

import pytest
from dialogue_file import write_dialogues


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory):
    """A .jsonl of eight scenes; every second one is asked about after its description."""
    return write_dialogues(tmp_path_factory.mktemp("dialogues"))
