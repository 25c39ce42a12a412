"""WHAT HAPPENS INSIDE: the model's own modules, opened for study beside the engine.

Owns   differentiable passes, kept layers, hooks, edits and searches step by step.
Takes  a LoadedModel, whose weights it shares; gives tensors.
Never  touches what the engine computes with, or what it has cached.

`MiniGPT4.lab` gives a `Lab`. The other names are for the types of functions that it is given.
"""

from minigpt4_runtime.lab.explanation import Explanation
from minigpt4_runtime.lab.hooks import Hook, Place
from minigpt4_runtime.lab.lab import Lab, Outcome
from minigpt4_runtime.lab.prompt import StudiedPrompt
from minigpt4_runtime.lab.searching import Answer, Processor, Seen
from minigpt4_runtime.lab.sight import Encoded
from minigpt4_runtime.lab.state import State

__all__ = [
    "Answer", "Encoded", "Explanation", "Hook", "Lab", "Outcome", "Place", "Processor", "Seen",
    "State", "StudiedPrompt",
]  # fmt: skip
