"""KL divergence: how far apart two models are in what they expect at each token of an answer.

Owns   the check that the models can be compared, and the KL of one answer.
Takes  two loaded models, a folder of images and a prompt; then cases, whose first answer is the
       reference's. Both models are fed that answer's tokens.
Never  generates a token: what a model itself would say has no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4_runtime.api import MiniGPT4
from minigpt4_runtime.errors import ConfigError, RequestError
from minigpt4_runtime.evaluation.answers import Case
from minigpt4_runtime.evaluation.images import find_image
from minigpt4_runtime.messages import ImageSource, Message, image

if TYPE_CHECKING:
    from torch import Tensor


class Divergence:
    """KL from a reference to a candidate. `name` says what it depends on, as a key of a ledger."""

    def __init__(
        self, reference: MiniGPT4, candidate: MiniGPT4, *, images_dir: Path, prompt: str
    ) -> None:
        """Check that both models read the prompt as the same tokens.

        Raises:
            ConfigError: they do not.
        """
        self._models = reference, candidate
        self._images_dir = images_dir
        self._prompt = prompt
        nothing = image(b"")  # Only opened when a model looks at it.
        self._encoded, other = (each.encode_prompt(self._ask(nothing)) for each in self._models)
        if self._encoded != other:
            raise ConfigError(
                "The two models differ in vocabulary, template or rows for a picture. KL is known "
                "only between versions of one model."
            )
        names = (
            f"{each.model_dir} {each.dtype} {each.device}, cache {each.cache_dtype}"
            for each in self._models
        )
        self.name = f"KL, {' to '.join(names)}, {prompt}"

    def of(self, case: Case) -> float:
        """In nats: the mean over all tokens of the reference's answer.

        Raises:
            RequestError: it cannot be known, and why.
        """
        answer, prompt_ids = case.answers[0], self._encoded.token_ids
        if not answer.token_ids:
            raise RequestError(
                "The reference has no token_ids. Give what `describe --out FILE.jsonl` wrote."
            )
        if answer.num_prompt not in (None, len(prompt_ids)):
            raise RequestError(
                f"Its prompt had {answer.num_prompt} tokens, and --prompt gives "
                f"{len(prompt_ids)}. Give the prompt of the answers."
            )
        found = find_image(self._images_dir, case.name)
        if found is None:
            raise RequestError(f"The folder {self._images_dir} lacks it.")
        picture = image(self._images_dir / found)
        wanted, given = (self._expect(model, picture, answer.token_ids) for model in self._models)
        return float((wanted.exp() * (wanted - given)).sum(1).mean())

    def _ask(self, picture: ImageSource) -> list[Message]:
        return [Message("user", (picture, self._prompt))]

    def _expect(self, model: MiniGPT4, picture: ImageSource, answer_ids: Sequence[int]) -> Tensor:
        """A model's log-probabilities of the next token: (T, V) for the T tokens of an answer."""
        (span,), (rows,) = self._encoded.image_spans, model.embed_images([picture])
        return model.probe.expect(
            self._encoded.token_ids, answer_ids, image_rows={span.start: rows}
        )
