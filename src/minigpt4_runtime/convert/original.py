"""The slow twin of a conversion: the original's mathematics with the original's names.

Owns   image tower, Q-Former, projection and Llama, computed weight by weight from published files.
Takes  the inventories of the published files; gives image rows and logits in float32.
Never  uses our names or our modules, so that an error in the key map shows.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from minigpt4_runtime.config import LanguageConfig, ModelConfig, QFormerConfig, VisionConfig
from minigpt4_runtime.convert.inventory import Inventory
from minigpt4_runtime.convert.recipe import Reader
from minigpt4_runtime.model.rotary import rotary_speeds

# Rows of a matrix that are widened to float32 at once.
_ROWS_AT_ONCE = 2048


class Originals:
    """Published tensors by name, rounded as the converted ones are, then widened to float32.

    They are rounded to `dtype`; None leaves each as it was published.
    """

    def __init__(
        self,
        inventories: Iterable[Inventory],
        dtype: torch.dtype | None,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._recipes = {name: each for part in inventories for name, each in part.recipes.items()}
        self._dtype = dtype
        self._on_bytes = on_bytes
        self._reader = Reader()

    def __contains__(self, name: str) -> bool:
        return name in self._recipes

    def exact(self, name: str) -> Tensor:
        """A tensor as it was published. One file is open at a time."""
        recipe = self._recipes[name]
        self._on_bytes(recipe.source_bytes)
        return self._reader.read(recipe)

    def round(self, tensor: Tensor) -> Tensor:
        """The value as the conversion rounds it."""
        return tensor.to(self._dtype or tensor.dtype).float()

    def __call__(self, name: str) -> Tensor:
        """A small tensor, whole."""
        return self.round(self.exact(name))

    def product(self, rows: Tensor, name: str, bias: Tensor | None = None) -> Tensor:
        """Give rows @ weight.T + bias, with the weight widened a part at a time."""
        parts = torch.split(self.exact(name), _ROWS_AT_ONCE)
        result = torch.cat([rows @ self.round(part).T for part in parts], dim=-1)
        return result if bias is None else result + bias

    def linear(self, rows: Tensor, name: str) -> Tensor:
        """A product with its bias, both under one name."""
        return self.product(rows, f"{name}.weight", self(f"{name}.bias"))

    def layer_norm(self, rows: Tensor, name: str, eps: float) -> Tensor:
        """Upstream's LayerNorm. A norm that is in no file has torch's initial weights."""
        if f"{name}.weight" not in self:
            return functional.layer_norm(rows, rows.shape[-1:], eps=eps)
        return functional.layer_norm(
            rows, rows.shape[-1:], self(f"{name}.weight"), self(f"{name}.bias"), eps
        )


def image_rows(originals: Originals, config: ModelConfig, pixels: Tensor) -> Tensor:
    """(1, 3, S, S) → (rows, hidden), as upstream's encode_img."""
    hidden = _eva_vit(originals, config.vision, pixels)
    hidden = originals.layer_norm(hidden, "ln_vision", config.vision.ln_vision_eps)
    if config.qformer is not None:
        hidden = _qformer(originals, config.qformer, hidden)
    else:
        patches = hidden[1:]
        hidden = torch.cat([patches[start::4] for start in range(4)], dim=-1)
    return originals.linear(hidden, "llama_proj")


def _eva_vit(originals: Originals, config: VisionConfig, pixels: Tensor) -> Tensor:
    """(1, 3, S, S) → (P, C)."""
    patches = functional.conv2d(
        pixels,
        originals("patch_embed.proj.weight"),
        originals("patch_embed.proj.bias"),
        stride=config.patch_size,
    )
    hidden = torch.cat([originals("cls_token")[0], patches[0].flatten(1).T])
    hidden = hidden + originals.round(_positions(originals.exact("pos_embed"), patches.shape[-1]))
    for block in range(config.num_hidden_layers):
        name = f"blocks.{block}"
        normed = originals.layer_norm(hidden, f"{name}.norm1", config.layer_norm_eps)
        query, value = (originals(f"{name}.attn.{part}_bias") for part in "qv")
        bias = torch.cat([query, torch.zeros_like(query), value])
        parts = originals.product(normed, f"{name}.attn.qkv.weight", bias).chunk(3, dim=-1)
        attended = _attend(parts, config.num_attention_heads)
        hidden = hidden + originals.linear(attended, f"{name}.attn.proj")
        normed = originals.layer_norm(hidden, f"{name}.norm2", config.layer_norm_eps)
        widened = functional.gelu(originals.linear(normed, f"{name}.mlp.fc1"))
        hidden = hidden + originals.linear(widened, f"{name}.mlp.fc2")
    return hidden


def _positions(table: Tensor, side: int) -> Tensor:
    """(1, 1 + P, C) → (1 + side², C): bicubic for another image size."""
    table = table[0].float()
    old = round((len(table) - 1) ** 0.5)
    if old == side:
        return table
    grid = table[1:].T.reshape(1, -1, old, old)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], grid[0].flatten(1).T])


def _qformer(originals: Originals, config: QFormerConfig, image: Tensor) -> Tensor:
    """(P, C) → (Q, hidden)."""
    eps = config.layer_norm_eps
    bert = "Qformer.bert"
    hidden = originals.layer_norm(originals("query_tokens")[0], f"{bert}.embeddings.LayerNorm", eps)
    for layer in range(config.num_hidden_layers):
        name = f"{bert}.encoder.layer.{layer}"
        for attention, seen in (("attention", None), ("crossattention", image)):
            block = f"{name}.{attention}"
            if f"{block}.self.query.weight" not in originals:
                continue
            context = hidden if seen is None else seen
            parts = [originals.linear(hidden, f"{block}.self.query")]
            parts += [
                originals.linear(context, f"{block}.self.{part}") for part in ("key", "value")
            ]
            attended = _attend(parts, config.num_attention_heads)
            attended = originals.linear(attended, f"{block}.output.dense")
            hidden = originals.layer_norm(attended + hidden, f"{block}.output.LayerNorm", eps)
        widened = functional.gelu(originals.linear(hidden, f"{name}.intermediate_query.dense"))
        narrowed = originals.linear(widened, f"{name}.output_query.dense")
        hidden = originals.layer_norm(narrowed + hidden, f"{name}.output_query.LayerNorm", eps)
    return hidden


def embed(originals: Originals, token_ids: Sequence[int]) -> Tensor:
    """Ids → (T, hidden)."""
    return originals.round(originals.exact("model.embed_tokens.weight")[list(token_ids)])


def logits(originals: Originals, config: LanguageConfig, hidden: Tensor) -> Tensor:
    """(T, hidden) embeddings of one sequence → (T, V)."""
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        normed = _rms_norm(originals, hidden, f"{name}.input_layernorm", config)
        q, k, v = (
            originals.product(normed, f"{name}.self_attn.{part}_proj.weight") for part in "qkv"
        )
        q, k = (_rotate(rows, config) for rows in (q, k))
        attended = _attend((q, k, v), config.num_attention_heads, causal=True)
        hidden = hidden + originals.product(attended, f"{name}.self_attn.o_proj.weight")
        normed = _rms_norm(originals, hidden, f"{name}.post_attention_layernorm", config)
        gate, up = (
            originals.product(normed, f"{name}.mlp.{p}_proj.weight") for p in ("gate", "up")
        )
        hidden = hidden + originals.product(
            functional.silu(gate) * up, f"{name}.mlp.down_proj.weight"
        )
    normed = _rms_norm(originals, hidden, "model.norm", config)
    return originals.product(normed, "lm_head.weight")


def _rms_norm(originals: Originals, rows: Tensor, name: str, config: LanguageConfig) -> Tensor:
    variance = rows.pow(2).mean(-1, keepdim=True)
    return originals(f"{name}.weight") * rows / torch.sqrt(variance + config.rms_norm_eps)


def _rotate(rows: Tensor, config: LanguageConfig) -> Tensor:
    """(T, heads·D) → the same, turned by position, as complex numbers."""
    half = config.head_dim // 2
    heads = rows.view(len(rows), -1, 2, half)
    # The one thing that is shared: no weight is in it, and tests hold it to transformers.
    speeds = rotary_speeds(config, rows.device)
    turns = torch.outer(torch.arange(len(rows)).float(), speeds)[:, None]
    scale = config.rope_scaling.attention_scale if config.rope_scaling else 1.0
    turned = torch.complex(heads[:, :, 0], heads[:, :, 1]) * torch.polar(
        torch.full_like(turns, scale), turns
    )
    return torch.cat([turned.real, turned.imag], dim=-1).view(len(rows), -1)


def _attend(parts: Sequence[Tensor], num_heads: int, *, causal: bool = False) -> Tensor:
    """(T, H·D), (S, Hkv·D), (S, Hkv·D) → (T, H·D)."""
    head_dim = parts[0].shape[-1] // num_heads
    q, k, v = (rows.view(len(rows), -1, head_dim).transpose(0, 1) for rows in parts)
    shared = len(q) // len(k)
    k, v = (rows.repeat_interleave(shared, dim=0) for rows in (k, v))
    scores = q @ k.transpose(1, 2) * head_dim**-0.5
    if causal:
        scores = scores + torch.full_like(scores[0], float("-inf")).triu(1)
    attended: Tensor = scores.softmax(-1) @ v
    return attended.transpose(0, 1).flatten(1)
