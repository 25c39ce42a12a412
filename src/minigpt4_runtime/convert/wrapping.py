"""The wrapping that programs put around published weights, and the marks of other layouts.

Owns   the tables: keys that hold weights, additions to names, and names of layouts not read here.
Takes  the content of a file or the names in it; gives plain names, or a sentence.
Never  opens a file.
"""

import re
from collections.abc import Iterable, Mapping

# Training programs keep the weights under one of these keys, beside optimiser and settings.
_HOLDERS = ("model", "state_dict", "model_state_dict", "module", "net", "weights")
_DEEPEST_HOLDER = 4

# DataParallel, torch.compile and FSDP add these to names, and later versions of PEFT the last two;
# no published name has them.
_ADDED_PIECES = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
    r"|(?<=\.lora_[AB]\.)default\.|(?<=_proj\.)base_layer\."
)
# A training class keeps the model in an attribute, recognised by the names behind it.
_OUTER_ATTRIBUTE = re.compile(
    r"(model|net|network)\."
    r"(?:(?:model|lm_head|llama_model|llama_proj|visual_encoder|patch_embed|blocks|Qformer"
    r"|ln_vision)\..*|query_tokens|cls_token|pos_embed)"
)
# Parts of a whole MiniGPT-4, saved while it ran. Published alone, they lack this beginning. PEFT
# adds to it where the language model has LoRA adapters.
_WHOLE_MODEL = re.compile(r"(?:^|.*\.)(?:visual_encoder|llama_model)\.(?:base_model\.model\.)?")

# Names in layouts that are not read, with a description and the remedy.
_FLOATS = "take the files that were published before quantisation."
_FOREIGN = (
    (
        r".*\.lora_\w+\..*|(.*\.)?base_model\.model\..*",
        "weights of a PEFT adapter (LoRA): merge it into its base model with peft's "
        "merge_and_unload, save that, and give its folder as --language.",
    ),
    (r".*\.(qweight|qzeros|g_idx)", f"weights quantised by GPTQ or AWQ: {_FLOATS}"),
    (
        r".*\.(nested_)?(absmax|quant_map)|.*\.quant_state\..*",
        f"weights quantised to 4 bits by bitsandbytes: {_FLOATS}",
    ),
    (
        r"(tok_embeddings|output)\.weight|layers\.\d+\.(attention|feed_forward)\..*",
        "a Llama in Meta's own format: take the folder published for transformers (its name ends "
        "in -hf).",
    ),
    (
        r"(vision_model|qformer|language_projection|language_model)\..*",
        "a BLIP-2 or LLaVA in the names of transformers: take the original's files.",
    ),
    (
        r"(t5_model|opt_model|llm_model)\..*",
        "another BLIP-2 with its own language model: take the files published for MiniGPT-4.",
    ),
)  # fmt: skip


def unwrap(content: object, is_weight: type) -> object:
    """The mapping of named weights within a file's content, or the content itself."""
    found = _find_holder(content, is_weight, _DEEPEST_HOLDER)
    return content if found is None else found


def _find_holder(content: object, is_weight: type, levels: int) -> Mapping[object, object] | None:
    if not isinstance(content, Mapping):
        return None
    for key in _HOLDERS if levels else ():
        if (found := _find_holder(content.get(key), is_weight, levels - 1)) is not None:
            return found
    return content if any(isinstance(value, is_weight) for value in content.values()) else None


def plain_names(stored: Iterable[str]) -> dict[str, str]:
    """The published name of each tensor of a file, without its wrapping.

    Example: "module.llama_model.model.norm.weight" is "model.norm.weight".
    """
    names = {name: _ADDED_PIECES.sub("", name) for name in stored}
    outer = next(filter(None, map(_OUTER_ATTRIBUTE.fullmatch, names.values())), None)
    before = "" if outer is None else f"{outer[1]}."
    return {name: _WHOLE_MODEL.sub("", plain.removeprefix(before)) for name, plain in names.items()}


def is_of_whole_model(stored: str) -> bool:
    """Whether a tensor's name says that it was saved with the whole model around it."""
    return _WHOLE_MODEL.match(stored) is not None


def describe_layout(names: Iterable[str]) -> str:
    """A sentence about the layout of these names, or an empty text for an unknown one."""
    known = list(names)
    for pattern, text in _FOREIGN:
        if any(re.fullmatch(pattern, name) for name in known):
            return f"It holds {text}"
    return ""
