"""A model class for lmms-eval, which answers with this runtime.

Owns   the translation of its requests and answers.
Takes  `Instance`s of its simple tasks, whose documents are in `task_dict`, by task, split, number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from minigpt4_runtime import Message, MiniGPT4, Reply, RequestError, SamplingParams
from minigpt4_runtime.evaluation.asking import ahead
from minigpt4_runtime.messages import image

PLACE = "<image>"
# Its own classes that ask a server begin so what stands for an answer that did not come.
NO_ANSWER = "[LMMS_EVAL_REQUEST_FAILED]"
_SETTINGS = ("max_new_tokens", "num_beams", "repetition_penalty", "length_penalty")
_OF_DRAWING = ("temperature", "top_p", "top_k")
# What is wrong with one request alone. Tasks open pictures themselves, hence the second.
_UNSERVED = (RequestError, OSError)

Found = TypeVar("Found")
logger = logging.getLogger(__name__)


class _Question(NamedTuple):
    """What is asked about a document, which is `at` a number, a task and a split of it.

    `show` gives the pictures.
    """

    at: Sequence[Any]
    text: str
    show: Callable[[], Sequence[Any] | None]
    settings: Mapping[str, Any]


class MiniGPT4Runtime(lmms):  # type: ignore[misc]
    """MiniGPT-4 by minigpt4-runtime. `settings` go to `MiniGPT4.load`."""

    def __init__(
        self,
        model: str = "demo",
        *,
        batch_size: object = None,
        max_batch_size: object = None,
        **settings: Any,
    ) -> None:
        """Load the model of this folder or name. The engine itself finds how many share a step."""
        del batch_size, max_batch_size
        super().__init__()
        self.model = MiniGPT4.load(model, **settings)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """An answer to each request, with its numbers of tokens.

        A request that cannot be served ends no run: the log says why, and so does what stands for
        its answer, behind `NO_ANSWER`.
        """
        asked = (
            self._question(at, text, settings, pictures)
            for text, settings, pictures, *at in (each.args for each in requests)
        )
        return [GenerationResult(*each) for each in self._ask(asked)]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """The answers to each request, one a round. A round of all requests is asked together.

        The task's `doc_to_text` says what is asked next, knowing the answers so far, or that this
        was all. Of requests that cannot be served see `generate_until`.
        """
        given = [each.args for each in requests]
        said: list[list[str]] = [[] for _ in given]
        notes: list[Any] = [None] * len(given)
        asked = {
            number: self._question(at, text, settings, pictures)
            for number, (text, settings, pictures, _, *at) in enumerate(given)
        }
        count = 0
        while asked:
            count += 1
            told = self._ask(asked.values())
            answered, asked = list(asked), {}
            for number, (answer, _) in zip(answered, told, strict=True):
                _, settings, _, go_on, *at = given[number]
                pictures, text, is_over, answers, notes[number] = go_on(
                    self._document(*at),
                    previous_output=[*said[number], answer],
                    round_idx=count,
                    previous_round_info=notes[number],
                )
                said[number] = list(answers)
                if not is_over:
                    asked[number] = _Question(at, text, partial(list, pictures or ()), settings)
        return said

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The loss of each continuation, and whether the model itself says that, as a pair.

        The loss is the mean of -log p over a continuation's ids, in nats: its other classes give
        that and its choices take the least, though the interface speaks of log-probabilities. A
        template has its own space before an answer, so that of a continuation is left out. The
        prompt of neighbours that differ in nothing else is computed once.

        Raises:
            RequestError: a request cannot be served: no loss could stand for it.
        """
        groups = groupby((each.args for each in requests), lambda args: (args[0], args[2:]))
        found = []
        for at, candidates, tickets in ahead(map(self._begin_scores, groups)):
            with _named(at):
                (scores,), said = tickets[0], _reply(tickets[1]).token_ids
            for ids, score in zip(candidates, scores, strict=True):
                pair = (-score / len(ids), said[: len(ids)] == ids)
                # Its evaluator makes a text of a bare pair, see `unwrap_generation_output`.
                found.append(GenerationResult(pair))
        return found

    def _begin_scores(self, group: tuple[Any, Iterable[Sequence[Any]]]) -> tuple[Any, ...]:
        """The document's place, the continuations' ids, tickets of scores and of an answer."""
        (text, where), asked = group
        # Without a document it is asked how likely a continuation is behind nothing.
        at = where[1:]
        pictures, document = (where[0], self._document(*at)) if where else (None, None)
        with _named(at):
            message = _message(text, pictures(document) if pictures else ())
        # A text's first id is the one that begins every text.
        candidates = [
            self.model.encode_text((said(document) if callable(said) else said).lstrip())[1:]
            for said in (args[1] for args in asked)
        ]
        longest = max(1, *map(len, candidates))
        sampling = SamplingParams(max_new_tokens=longest, stop=())
        with _named(at):
            scores = self.model.submit_score([message], candidates)
            return at, candidates, (scores, self.model.submit([message], sampling))

    def _question(
        self, at: Any, text: str, settings: Any, pictures: Callable[..., Any]
    ) -> _Question:
        return _Question(at, text, lambda: pictures(self._document(*at)), settings)

    def _ask(self, asked: Iterable[_Question]) -> Iterator[tuple[str, TokenCounts | None]]:
        """The answers and their numbers of tokens."""
        begun = ((each, _tried(partial(self._begin, each))) for each in asked)
        for question, ticket in ahead(begun):
            reply = ticket if isinstance(ticket, Exception) else _tried(partial(_reply, ticket))
            if isinstance(reply, Exception):
                logger.error("%s has no answer: %s", _name(question.at), reply)
                yield f"{NO_ANSWER} {reply}", None
            else:
                usage = reply.usage
                yield reply.text, TokenCounts(usage.prompt_tokens, usage.completion_tokens)

    def _begin(self, question: _Question) -> Any:
        message = _message(question.text, question.show())
        return self.model.submit([message], _sampling(question.settings))

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]


def _message(text: str, pictures: Sequence[Any] | None) -> Message:
    """Pictures in their places, as many as there are; else before the text."""
    shown = [image(each) for each in pictures or ()]
    parts = text.split(PLACE)
    if len(parts) - 1 != len(shown):
        parts = [*[""] * len(shown), text]
    content: list[Any] = [parts[0]]
    for picture, part in zip(shown, parts[1:], strict=True):
        content += [picture, part]
    return Message("user", tuple(part for part in content if part != "") or ("",))


def _sampling(given: Mapping[str, Any]) -> SamplingParams:
    """A task's `generation_kwargs`. An answer is greedy unless they ask for a draw."""
    is_drawn = given.get("do_sample", (given.get("temperature") or 0) > 0)
    names = (*_SETTINGS, *(_OF_DRAWING if is_drawn else ()))
    settings = {name: given[name] for name in names if given.get(name) is not None}
    until = given.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    return SamplingParams(**settings, stop=stop or None)


def _reply(ticket: Any) -> Reply:
    *_, last = ticket
    reply: Reply = last.reply
    return reply


def _tried(act: Callable[[], Found]) -> Found | Exception:
    """What it gives, or why this request alone cannot be served."""
    try:
        return act()
    except _UNSERVED as error:
        return error


def _name(at: Sequence[Any]) -> str:
    return "Document {} of {} ({})".format(*at) if at else "What is asked without a document"


@contextmanager
def _named(at: Sequence[Any]) -> Iterator[None]:
    """Name the document in what is wrong with its request."""
    try:
        yield
    except _UNSERVED as error:
        raise RequestError(f"{_name(at)} has no loss: {error}") from error
