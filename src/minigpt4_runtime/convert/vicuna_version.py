"""Is a folder's Vicuna the version that MiniGPT-4 was trained with, v0?

Owns   the signs of later versions, in config.json and added_tokens.json.
Takes  the language model's folder; gives a warning, or an empty text.
Never  refuses a folder: the signs can be wrong.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minigpt4_runtime.checkpoint.file_kind import as_number, read_json, show_value

_Values = Mapping[str, Any]
_LATER = re.compile(r"vicuna.*\bv?1\.\d", re.IGNORECASE)
_WIDTHS = (4096, 5120)


def _names_a_later_version(config: _Values, _: _Values) -> str:
    name = str(config.get("_name_or_path") or "")
    return f"config.json calls it {name[-80:]!r}" if _LATER.search(name.replace("_", "-")) else ""


def _has_a_longer_context(config: _Values, _: _Values) -> str:
    length = as_number(config.get("max_position_embeddings"))
    is_longer = isinstance(length, int) and length > 2048
    return f"its context is {length} tokens, and v0's is 2048" if is_longer else ""


def _has_no_padding_token(config: _Values, added: _Values) -> str:
    if as_number(config.get("vocab_size")) != 32000 or "[PAD]" in added:
        return ""
    return f"its vocab_size is {show_value(config, 'vocab_size')}, and v0 has 32001 with [PAD]"


_SIGNS: tuple[Callable[[_Values, _Values], str], ...] = (
    _names_a_later_version, _has_a_longer_context, _has_no_padding_token,
)  # fmt: skip


def describe_version(folder: Path) -> str:
    """A warning about a Vicuna that is not v0, or an empty text where there is no sign of it."""
    config = read_json(folder / "config.json")
    if as_number(config.get("hidden_size")) not in _WIDTHS:
        return ""
    added_path = folder / "added_tokens.json"
    added = read_json(added_path) if added_path.is_file() else {}
    signs = [text for sign in _SIGNS if (text := sign(config, added))]
    if not signs:
        return ""
    return (
        f"{folder} seems to be no Vicuna v0, which MiniGPT-4's Vicuna variant was trained with, "
        f"but a later version or a plain LLaMA ({'; '.join(signs)}): answers may be wrong or not "
        "end. Take Vicuna v0 if they are."
    )
