"""`python -m minigpt4_runtime`: the command line, where its script is not on the path."""

from minigpt4_runtime.cli.main import run

run()
