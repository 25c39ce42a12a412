"""Adapters with random numbers, written as PEFT and `minigpt4 tune` write them."""

import json

import torch
from safetensors.torch import save_file

from minigpt4_runtime.checkpoint.adapter import encode_adapter, read_projection
from minigpt4_runtime.checkpoint.graph_folder import vision_digest

ALL = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
       "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
OWN = dict(zip(ALL, ("attention.query", "attention.key", "attention.value", "attention.out",
                     "mlp_gate", "mlp_up", "mlp_down"), strict=True))  # fmt: skip


def write_lora(
    folder, language, *, seed, rank=3, alpha=6.0, targets=ALL, size=0.3, record=None, **settings
):
    """A PEFT folder for a language model; gives its tensors. `settings` are more of PEFT's."""
    generator = torch.Generator().manual_seed(seed)
    hidden, gated = language.hidden_size, language.intermediate_size
    queries, keys = (
        heads * language.head_dim
        for heads in (language.num_attention_heads, language.num_key_value_heads)
    )
    ins_outs = (
        (queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries), (gated, hidden),
        (gated, hidden), (hidden, gated),
    )  # fmt: skip
    shapes = dict(zip(ALL, ins_outs, strict=True))
    tensors = {}
    for layer in range(language.num_hidden_layers):
        for target in targets:
            out_features, in_features = shapes[target]
            stem = f"base_model.model.model.layers.{layer}.{target}"
            for side, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                drawn = torch.randn(shape, generator=generator)
                tensors[f"{stem}.lora_{side}.weight"] = drawn * size * shape[1] ** -0.5
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} | ({"minigpt4_tuned": json.dumps(record)} if record else {})
    save_file(tensors, folder / "adapter_model.safetensors", metadata)
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none",
        "target_modules": [target.partition(".")[2] for target in targets],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return tensors


def write_projection(path, model_dir, *, seed, size=0.5):
    """A projection with noise of that size beside its own numbers."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = read_projection(model_dir)
    noise = torch.randn(weight.shape, generator=generator) * size * weight.std()
    record = {"base": vision_digest(model_dir), "model": model_dir.name}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_adapter(weight + noise, bias, record))


def merge_by_hand(tensors, weights, *, scale):
    """Add B·A·scale in float32 to weights by our names, in place."""
    for name, low in tensors.items():
        if ".lora_A." not in name:
            continue
        high = tensors[name.replace(".lora_A.", ".lora_B.")]
        stem = name.removesuffix(".lora_A.weight").partition(".layers.")[2]
        layer, _, target = stem.partition(".")
        ours = f"language.layers.{layer}.{OWN[target]}.weight"
        held = weights[ours]
        weights[ours] = (held.float() + (high @ low) * scale).to(held.dtype)
