"""What a caller puts beside a request: functions that change its logits, and prompts they see.

Owns   the checks of both, and the way from a named prompt to what the engine takes.
Takes  a LoadedModel, functions, and prompts by name.
Never  calls such a function: the engine does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from minigpt4_runtime.engine.request import Beside
from minigpt4_runtime.engine.steering import LogitsProcessor
from minigpt4_runtime.errors import RequestError
from minigpt4_runtime.loaded import LoadedModel
from minigpt4_runtime.text.prompt import Prompt
from minigpt4_runtime.text.tokenizer import EncodedPrompt

T = TypeVar("T")


@dataclass(frozen=True)
class Steering:
    """The processors of a request, and its other prompts by name, whose pictures are not open."""

    processors: tuple[LogitsProcessor, ...]
    prompts: Mapping[str, tuple[Prompt, EncodedPrompt]]

    @classmethod
    def read(
        cls,
        loaded: LoadedModel,
        processors: Sequence[LogitsProcessor],
        branches: Mapping[str, T] | None,
        to_prompt: Callable[[T], Prompt],
    ) -> Steering:
        """Check both, and turn the branches into prompts.

        Raises:
            RequestError: a processor cannot be called, or no processor would see the branches.
        """
        branches = {} if branches is None else branches
        if not isinstance(branches, Mapping):
            raise RequestError("branches is a mapping from names to other prompts.")
        if callable(processors) or not all(map(callable, processors)):
            raise RequestError(
                "processors is a list of functions, each from a NextLogits to a tensor of logits."
            )
        if branches and not processors:
            raise RequestError(
                f"There are branches ({', '.join(branches)}) and no processor that sees them. Give "
                "processors too, or leave out branches."
            )
        if "" in branches:
            raise RequestError("A branch needs a name: '' is the prompt itself.")
        others = {name: to_prompt(each) for name, each in branches.items()}
        prompts = {name: (each, loaded.encode_prompt(each)) for name, each in others.items()}
        return cls(tuple(processors), prompts)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each of the other prompts has."""
        return tuple(len(encoded.token_ids) for _, encoded in self.prompts.values())

    def open(self, loaded: LoadedModel) -> tuple[Beside, ...]:
        """The other prompts with their pictures.

        Raises:
            ImageError: one cannot be read.
        """
        return tuple(
            Beside(name, encoded.token_ids, loaded.open_images(prompt, encoded))
            for name, (prompt, encoded) in self.prompts.items()
        )
