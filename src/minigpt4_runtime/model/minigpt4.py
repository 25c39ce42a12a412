"""MiniGPT-4 (Zhu et al., 2023): the image side and the language side, side by side.

Owns   pixels → rows as one graph, and the pairing of the two sides.
Takes  ModelConfig. Example: 224 px, Q-Former: (N, 3, 224, 224) → (N, 32, 4096).
Never  places rows into a prompt: that needs spans, which the engine knows.
"""

from torch import Tensor, nn

from minigpt4_runtime.config import ModelConfig
from minigpt4_runtime.model.eva_vit import EvaVit
from minigpt4_runtime.model.linear import Linear
from minigpt4_runtime.model.llama import Llama
from minigpt4_runtime.model.parallel import Group
from minigpt4_runtime.model.qformer import QFormer


class VisionPart(nn.Module):
    """ViT → ln_vision → Q-Former, or groups of patches → projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision = config.vision
        self.vit = EvaVit(vision)
        self.ln_vision = nn.LayerNorm(vision.hidden_size, eps=vision.ln_vision_eps)
        self.qformer = QFormer(config.qformer, vision.hidden_size) if config.qformer else None
        self.projection = Linear(config.projection_width, config.language.hidden_size, bias=True)
        self.rows_per_image = config.rows_per_image

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, R, hidden) rows for the language model."""
        return self.projection(self.features(pixels))  # type: ignore[no-any-return]

    def features(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, R, projection_width): all but the projection."""
        hidden = self.tower(pixels)
        if self.qformer is not None:
            return self.qformer(hidden)  # type: ignore[no-any-return]
        # The class row is left out; neighbouring patches lie side by side in one group.
        return hidden[:, 1:].reshape(pixels.shape[0], self.rows_per_image, -1)

    def tower(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, P, C): all before the Q-Former."""
        return self.ln_vision(self.vit(pixels))  # type: ignore[no-any-return]


class MiniGPT4Model(nn.Module):
    """Both sides. They meet only in the rows that the caller puts into the prompt.

    Of several ranks, only the leader has this; the others have their part of a Llama.
    """

    def __init__(self, config: ModelConfig, group: Group | None = None) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionPart(config)
        self.language = Llama(config.language, group)
