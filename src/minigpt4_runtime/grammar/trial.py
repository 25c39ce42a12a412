"""Compiles one grammar in a process of its own, which may run out of time, memory or stack.

Owns   the limits of compiling and of following a grammar.
Takes  a grammar at its standard input; prints the reason why it cannot be followed, or nothing.
Never  imports a module of this package: it is run as a file, so that it starts quickly.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

# The limits of one step, so that a grammar cannot delay the other answers.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
SECONDS = 2
_BYTES = 2**30
# Less than any thread of the calling process has, so that a grammar that passes here passes there.
_STACK_BYTES = 2**20


class _Bytes:
    """A vocabulary of all bytes and an end, under the names that llguidance asks for."""

    eos_token_id = bos_token_id = 256
    tokens = (*(bytes([value]) for value in range(256)), b"</s>")
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def fault_of(grammar: str) -> str:
    """Why a grammar cannot be followed, in the compiler's words; nothing where it can."""
    import llguidance

    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))
    limits = llguidance.LLParserLimits(**LIMITS)
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    fault = str(matcher.get_error())
    return "no text matches it" if fault.startswith("NoExtensionBias") else fault


def _limit_resources() -> None:
    try:
        import resource
    except ModuleNotFoundError:
        return  # On Windows the process that waits ends this one.
    for kind, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, _BYTES)):
        try:
            resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))
        except (OSError, ValueError):
            continue  # It is lower already, or not to be set on this system.


def _main() -> None:
    _limit_resources()
    grammar = sys.stdin.buffer.read().decode("utf-8")
    faults: list[str] = []
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=lambda: faults.append(fault_of(grammar)))
    thread.start()
    thread.join()
    sys.stdout.buffer.write(faults[0].encode("utf-8"))


if __name__ == "__main__":
    _main()
