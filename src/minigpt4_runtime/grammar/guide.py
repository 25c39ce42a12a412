"""A JSON schema or a regex → the ids that may come next in an answer.

Owns   the grammars of one vocabulary: compiled by llguidance within limits, once, and kept.
Takes  the grammar of SamplingParams; gives a GrammarGuide for each answer.
Never  knows logits. A guide's state depends only on the ids that it was fed.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from typing import Any

import numpy
from numpy.typing import NDArray

from minigpt4_runtime.config import GrammarKind, SamplingParams
from minigpt4_runtime.errors import GrammarError
from minigpt4_runtime.grammar import trial
from minigpt4_runtime.grammar.closing import closed
from minigpt4_runtime.optional import require
from minigpt4_runtime.text.tokenizer import Tokenizer

MAX_CHARACTERS = 2**16
_NUM_KEPT = 64
_TOO_MUCH = "it takes too much time or memory to compile"
# A trial may have to wait for a processor; its own limit counts processor time.
_TRIAL_SECONDS = 10 * trial.SECONDS
# On one line, with or without a space behind "," and ":". With blanks wherever JSON allows them a
# model may write nothing else until its tokens are used up.
_JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


class GrammarGuide:
    """A `Guide` of llguidance: says which ids may follow an answer."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> NDArray[numpy.bool_]:
        """(V,): whether each id may come next; the end id where the form is complete.

        Raises:
            GrammarError: to find out takes more than the limits allow.
        """
        bits = numpy.frombuffer(self._matcher.compute_bitmask(), numpy.uint8)
        self._check()
        return numpy.unpackbits(bits, count=self._vocab_size, bitorder="little").view(numpy.bool_)

    def feed(self, token_id: int) -> None:
        """Take one more id, which was allowed.

        Raises:
            GrammarError: to follow it takes more than the limits allow.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def fork(self) -> GrammarGuide:
        """A copy, for another branch of the answer."""
        return GrammarGuide(self._matcher.deep_copy(), self._vocab_size)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(
                "The answer's form takes too much work to follow "
                f"({_reason(self._matcher.get_error())}). Ask for a simpler one."
            )


class Grammars:
    """Compiles grammars. Use it from any number of threads at once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        # Failures are kept too, as compiling them again would cost as much.
        self._compiled = functools.lru_cache(_NUM_KEPT)(self._compile)

    def guide(self, sampling: SamplingParams) -> GrammarGuide | None:
        """The guide of an answer; None without a grammar.

        Raises:
            GrammarError: the schema or regex cannot be followed.
            BackendUnavailableError: llguidance is not installed.
        """
        if sampling.grammar is None:
            return None
        compiled = self._compiled(*sampling.grammar)
        if isinstance(compiled, GrammarError):
            raise GrammarError(str(compiled))  # A traceback of its own.
        return compiled.fork()

    def _compile(self, kind: GrammarKind, text: str) -> GrammarGuide | GrammarError:
        llguidance = require("llguidance", extra="structured")
        try:
            source = _source(kind, text)
            if fault := _try_out(source):
                raise ValueError(fault)
        except RecursionError:
            return GrammarError(f"{kind} cannot be followed: it is nested too deeply.")
        except ValueError as error:
            return GrammarError(f"{kind} cannot be followed: {_reason(str(error))}.")
        limits = llguidance.LLParserLimits(**trial.LIMITS)
        matcher = llguidance.LLMatcher(self._vocabulary, source, log_level=0, limits=limits)
        return GrammarGuide(matcher, self._vocab_size)

    @functools.cached_property
    def _vocabulary(self) -> Any:
        llguidance = require("llguidance", extra="structured")
        names = _Vocabulary(self._tokenizer, self._vocab_size)
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(names))


class _Vocabulary:
    """A tokenizer under the names that llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
        self.tokens = [tokenizer.bytes_of(token_id) for token_id in range(vocab_size)]
        known = range(tokenizer.vocab_size)
        self.special_token_ids = [i for i in known if not tokenizer.is_text(i)]
        self._encode = tokenizer.encode
        self._line_end = self._encode("\n")[-1]
        self._bytes = {self.tokens[i]: i for i in known if tokenizer.is_byte(i)}

    def __call__(self, text: bytes) -> list[int]:
        """The tokenizer's usual ids for a text in the middle of another."""
        # sentencepiece puts a space before a text: here it stands before the line end.
        ids = self._encode("\n" + text.decode("utf-8", "replace"))
        ids = ids[ids.index(self._line_end) + 1 :] if self._line_end in ids else []
        # Ids of any other text would be allowed in place of these.
        if b"".join(self.tokens[i] for i in ids) == text:
            return ids
        return [self._bytes[text[at : at + 1]] for at in range(len(text))]


def _source(kind: GrammarKind, text: str) -> str:
    """The grammar as llguidance reads it.

    An answer may open with a space, which Llama's words bring along and a reply leaves out.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters, and {MAX_CHARACTERS:,} are allowed")
    if kind == "regex":
        matcher = require("llguidance", extra="structured").LLMatcher
        # It must match the whole answer, so that anchors are not needed.
        whole = re.sub(r"(?<!\\)((?:\\\\)*)\$$", r"\1", text.removeprefix("^"))
        return str(matcher.grammar_from_regex(f" ?(?:{whole})"))
    schema = json.loads(text)
    if not isinstance(schema, dict):
        raise ValueError("a schema is an object")
    form = {"name": "json", "json_schema": {**closed(schema), "x-guidance": _JSON_LAYOUT}}
    return json.dumps({"grammars": [{"lark_grammar": 'start: " "? @json'}, form]})


def _try_out(source: str) -> str:
    """Why a grammar cannot be compiled; nothing where it can.

    A compiler's thread cannot be stopped, and a stack that runs over ends the process it is in.
    """
    command = [sys.executable, "-P", trial.__file__]
    try:
        done = subprocess.run(
            command, input=source.encode(), capture_output=True, timeout=_TRIAL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        # Not kept as a fault: the machine may only have been busy.
        raise GrammarError(
            f"The answer's form was not compiled within {_TRIAL_SECONDS} seconds. Ask again, or "
            "for a simpler one."
        ) from None
    return done.stdout.decode("utf-8") if done.returncode == 0 else _TOO_MUCH


def _reason(message: str) -> str:
    """The line of a compiler's message that names the fault."""
    found = re.search(r"^error: (.*)", message, flags=re.MULTILINE)
    line = found[1] if found else message.partition("\n")[0]
    return re.sub(r"^at \d+\(\d+\): ", "", line)[:200].rstrip(". ")
