"""What benchmarks ask other environments is answered, or ends them in words."""

import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
ONE_ANSWER = """
import json
import sys

asked = json.loads(input())
print(json.dumps({"twice": 2 * asked["number"]}), flush=True)
sys.exit(3)
"""


def test_a_program_that_ends_ends_the_benchmark_in_words(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(CHECKOUT / "benchmarks")
    from rivals import Program

    script = tmp_path / "other_side.py"
    script.write_text(ONE_ANSWER, "utf-8")
    program = Program(sys.executable, script)
    assert program.ask(number=21) == {"twice": 42}
    with pytest.raises(SystemExit, match=r"other_side\.py ended with 3; what it wrote says why"):
        program.ask(number=1)
