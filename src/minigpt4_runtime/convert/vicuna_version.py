"""Is a folder's Vicuna the version that MiniGPT-4 was trained with, v0?

Owns   the signs of later versions, in config.json and added_tokens.json.
Takes  the language model's folder; gives a warning, or an empty text.
Never  refuses a folder: the signs can be wrong.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minigpt4_runtime.checkpoint.file_kind import as_number, read_json, show_value

_LATER = re.compile(r"vicuna.*\bv?1\.\d", re.IGNORECASE)
_WIDTHS = (4096, 5120)


def _list_signs(config: Mapping[str, Any], added: Mapping[str, Any]) -> Iterator[str]:
    """The signs of another version than v0."""
    name = str(config.get("_name_or_path") or "")
    if _LATER.search(name.replace("_", "-")):
        yield f"config.json calls it {name[-80:]!r}"
    length = as_number(config.get("max_position_embeddings"))
    if isinstance(length, int) and length > 2048:
        yield f"its context is {length} tokens, and v0's is 2048"
    if as_number(config.get("vocab_size")) == 32000 and "[PAD]" not in added:
        yield f"its vocab_size is {show_value(config, 'vocab_size')}, and v0 has 32001 with [PAD]"


def describe_version(folder: Path) -> str:
    """A warning about a Vicuna that is not v0, or an empty text where there is no sign of it."""
    config = read_json(folder / "config.json")
    if as_number(config.get("hidden_size")) not in _WIDTHS:
        return ""
    added_path = folder / "added_tokens.json"
    added = read_json(added_path) if added_path.is_file() else {}
    signs = list(_list_signs(config, added))
    if not signs:
        return ""
    return (
        f"{folder} seems to be no Vicuna v0, which MiniGPT-4's Vicuna variant was trained with, "
        f"but a later version or a plain LLaMA ({'; '.join(signs)}): answers may be wrong or not "
        "end. Take Vicuna v0 if they are."
    )
