"""The demo model's configuration, and the modules that only its training needs.

Owns   its sizes and initial weights, and the probes and known rows, which are dropped afterwards.
"""

import math

import torch
from demo_lessons import ATTRIBUTES, BACKGROUNDS, NUM_CELLS, TEMPLATE
from torch import Tensor, nn
from torch.nn import functional

from minigpt4_runtime.config import LanguageConfig, ModelConfig, QFormerConfig, VisionConfig
from minigpt4_runtime.evaluation import scenes
from minigpt4_runtime.model.llama import LlamaLayer
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model


def demo_config(vocab_size: int) -> ModelConfig:
    """The published Vicuna variant's architecture, small enough for git."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=96, patch_size=12, hidden_size=160, num_hidden_layers=5,
            num_attention_heads=4, intermediate_size=640,
        ),
        qformer=QFormerConfig(
            hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384,
            num_query_tokens=NUM_CELLS + 1,
        ),
        language=LanguageConfig(
            hidden_size=160, intermediate_size=448, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=vocab_size, max_position_embeddings=1024,
            rms_norm_eps=1e-6, rope_theta=1e6,
        ),
        template=TEMPLATE.name,
    )  # fmt: skip


def initialise(model: MiniGPT4Model) -> None:
    """Small normal weights, unit norms, zero biases; the language stream grows slowly."""
    for name, weight in model.named_parameters():
        if "norm" in name or "ln_vision" in name:
            nn.init.ones_(weight) if name.endswith("weight") else nn.init.zeros_(weight)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)
        elif "patch_embedding" in name or not ("embedding" in name or "query_tokens" in name):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        else:
            nn.init.normal_(weight, std=0.1)
    share = (2 * len(model.language.layers)) ** -0.5
    with torch.no_grad():
        for layer in model.language.layers:
            assert isinstance(layer, LlamaLayer)
            # Keys that start near queries let a word find its like (Trockman and Kolter, 2023).
            nn.init.orthogonal_(layer.attention.query.weight)
            noise = torch.randn_like(layer.attention.key.weight) * 160**-0.5
            layer.attention.key.weight.copy_(0.5 * layer.attention.query.weight + 0.7 * noise)
            layer.attention.out.weight.mul_(share)
            layer.mlp_down.weight.mul_(share)


class Probe(nn.Module):
    """Predicts kind, colour and size from a row. Used only in training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, 1 + len(v)) for v in ATTRIBUTES.values())

    def loss(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(N, P, C) rows, (N, P, 3) labels → the loss, and whether each row is entirely right."""
        loss, right = torch.zeros((), device=rows.device), torch.ones_like(labels[..., 0]).bool()
        for index, head in enumerate(self.heads):
            logits = head(rows)
            loss = loss + functional.cross_entropy(
                logits.flatten(0, 1), labels[..., index].flatten()
            )
            right &= logits.argmax(-1) == labels[..., index]
        return loss, right


class Looker(nn.Module):
    """The tower and the Q-Former with their probes: query i learns to predict cell i."""

    def __init__(self, model: MiniGPT4Model) -> None:
        super().__init__()
        assert model.config.qformer is not None
        self.vision = model.vision
        self.patch_probe = Probe(model.config.vision.hidden_size)
        self.cell_probe = Probe(model.config.qformer.hidden_size)
        self.background = nn.Linear(model.config.qformer.hidden_size, len(BACKGROUNDS))

    def read(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels → tower rows and Q-Former rows."""
        assert self.vision.qformer is not None
        rows = self.vision.ln_vision(self.vision.vit(pixels))
        return rows, self.vision.qformer(rows)

    def cell_loss(
        self, queries: Tensor, cells: Tensor, backgrounds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The queries' loss on cells and background, and which images are entirely right."""
        loss, right = self.cell_probe.loss(queries[:, :NUM_CELLS], cells)
        logits = self.background(queries[:, NUM_CELLS])
        loss = loss + functional.cross_entropy(logits, backgrounds)
        return loss, right.all(-1) & (logits.argmax(-1) == backgrounds)


class KnownRows(nn.Module):
    """Rows that encode a scene directly, in place of an image's rows."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(
            nn.Embedding(1 + len(names), hidden_size) for names in ATTRIBUTES.values()
        )
        self.backgrounds = nn.Embedding(len(BACKGROUNDS), hidden_size)
        self.places = nn.Embedding(NUM_CELLS, hidden_size)

    def forward(self, cells: Tensor, backgrounds: Tensor) -> Tensor:
        """(N, 9, 3), (N,) → (N, 10, hidden)."""
        rows = self.places.weight + sum(table(cells[..., i]) for i, table in enumerate(self.tables))
        return torch.cat([rows, self.backgrounds(backgrounds)[:, None]], dim=1)


class WordVectors:
    """Initial embeddings: all forms of a word near each other, and rows near their words.

    "star", "star " and "stars" are unrelated pieces; without this, training would have to find for
    every word that they are one word. The same holds for rows and the words for them.
    """

    def __init__(self, hidden_size: int) -> None:
        self._hidden_size = hidden_size
        self._vectors: dict[str, Tensor] = {}

    def of(self, text: str) -> Tensor:
        """The vector of a word, or the mean direction of several."""
        words = [self._stem(word) for word in text.split() if word not in ("at", "the", "on", "in")]
        for word in words:
            self._vectors.setdefault(word, torch.randn(self._hidden_size))
        total = sum((self._vectors[word] for word in words), torch.zeros(self._hidden_size))
        return total / math.sqrt(max(len(words), 1))

    @staticmethod
    def _stem(word: str) -> str:
        word = word.lower().strip(".,?")
        for noun in (*scenes.KINDS, "shape"):
            if word in (f"{noun}s", f"{noun}es"):
                return noun
        return word

    @torch.no_grad()
    def start(self, model: MiniGPT4Model, known: "KnownRows", pieces: list[str]) -> None:
        """Set the embedding table, the head and the known rows."""
        own = torch.randn(len(pieces), self._hidden_size)
        shared = torch.stack([self.of(piece.replace("▁", " ")) for piece in pieces])
        table = 0.4 * shared + 0.3 * own
        model.language.token_embedding.weight.copy_(table)
        model.language.head.weight.copy_(0.2 * table)
        for names, rows in zip(ATTRIBUTES.values(), known.tables, strict=True):
            assert isinstance(rows, nn.Embedding)
            nn.init.normal_(rows.weight, std=0.4)
            rows.weight[1:] = 0.4 * torch.stack([self.of(name) for name in names])
        known.backgrounds.weight.copy_(
            0.4 * torch.stack([self.of(f"{name} background") for name in BACKGROUNDS])
        )
        known.places.weight.copy_(0.4 * torch.stack([self.of(p) for p in scenes.PLACES]))
