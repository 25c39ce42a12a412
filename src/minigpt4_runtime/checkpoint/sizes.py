"""The sizes of the published models, known without their files.

Owns   the sums over a preset's shapes. Takes its name and a dtype; gives bytes.
Never  reads a file.
"""

from functools import cache

from minigpt4_runtime.cache.sizes import token_bytes
from minigpt4_runtime.checkpoint.weights import WeightForm
from minigpt4_runtime.config import CacheDTypeName, DTypeName, ModelConfig
from minigpt4_runtime.formats.contracts import Part
from minigpt4_runtime.formats.dense import DENSE
from minigpt4_runtime.formats.registry import FormatChoice
from minigpt4_runtime.presets import PRESETS


@cache
def _list_parts(
    config: ModelConfig, formats: str | tuple[tuple[str, str], ...]
) -> tuple[Part, ...]:
    # Imported here: the table of sources and `minigpt4 models` need no torch.
    from minigpt4_runtime.checkpoint.blank_model import blank_model, list_parts

    choice = formats if isinstance(formats, str) else dict(formats)
    return tuple(list_parts(blank_model(config, formats=choice)).values())


def list_all_parts(config: ModelConfig, formats: FormatChoice) -> tuple[Part, ...]:
    """The parts of all weights of a model; a second call for the same costs nothing.

    Raises:
        ConfigError: a format cannot hold a weight.
    """
    return _list_parts(config, formats if isinstance(formats, str) else tuple(formats.items()))


def weight_bytes(preset: str, dtype: DTypeName, formats: FormatChoice = DENSE.name) -> int:
    """The size of a preset's weights, in a model folder and in memory."""
    parts = list_all_parts(PRESETS[preset], formats)
    return sum(WeightForm(part.shape, part.dtype or dtype).num_bytes for part in parts)


def running_bytes(preset: str, dtype: DTypeName, formats: FormatChoice = DENSE.name) -> int:
    """The memory of a running preset: weights, and keys and values of one context.

    The intermediate values of a step are small beside these and not counted.
    """
    language = PRESETS[preset].language
    cache_bytes = language.context_length * token_bytes(language, dtype)
    return weight_bytes(preset, dtype, formats) + cache_bytes


def fitting_tokens(preset: str, dtype: CacheDTypeName, num_bytes: int) -> int:
    """How many tokens' keys and values of a preset go into so much memory."""
    return max(0, num_bytes) // token_bytes(PRESETS[preset].language, dtype)
