"""What the demo model with boxes is taught: placed scenes as numbers, and dialogues about them.

Owns   its tokenizer, the known rows with corners, and scenes with boxes as labels and token ids.
Takes  a random.Random; the same state gives the same data.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from demo_lessons import BACKGROUNDS, NUM_CELLS, cell_labels, crowded_scene, patch_labels, picture
from demo_parts import KnownRows, Probe
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor, nn
from torch.nn import functional

from minigpt4_runtime.evaluation import box_scenes, scenes
from minigpt4_runtime.evaluation.box_scenes import PlacedScene
from minigpt4_runtime.messages import TaskName
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model
from minigpt4_runtime.text.prompt import TEMPLATES
from minigpt4_runtime.text.tokenizer import Tokenizer

TEMPLATE = TEMPLATES["minigptv2"]
# Each is one id, so that a corner of a box is said in one step.
NUMBERS = tuple(f"<{number}>" for number in range(101))
_MARKS = ("[INST]", "[/INST]", *(f"[{task}]" for task in TEMPLATE.tasks), "<p>", "</p>", "<delim>",
          "{", "}")  # fmt: skip
NEW_PIECES = (*_MARKS, *NUMBERS)
_PERIODS = (200.0, 100.0, 50.0, 25.0, 13.0, 7.0)  # In hundredths of the picture.
NUM_WAVES = 2 * len(_PERIODS)
NUM_CORNERS = 4
LONGEST = 150  # Of ids of one dialogue, so that little of a batch is empty.
# How often each task is asked for.
SHARES: dict[TaskName, int] = {
    "refer": 4, "detection": 9, "grounding": 5, "identify": 3, "caption": 1, "vqa": 2,
}  # fmt: skip


def extend_tokenizer(source: Path, path: Path) -> None:
    """The first demo model's tokenizer with the words of tasks and boxes behind its own."""
    model = sentencepiece_model_pb2.ModelProto.FromString(  # type: ignore[attr-defined]
        source.read_bytes()
    )
    for text in NEW_PIECES:
        piece = model.pieces.add()
        piece.piece, piece.score, piece.type = text, 0.0, piece.USER_DEFINED
    model.trainer_spec.vocab_size = len(model.pieces)
    path.write_bytes(model.SerializeToString())


def waves() -> Tensor:
    """0 to 100 as sines and cosines, so that near numbers are near: (101, NUM_WAVES)."""
    angles = torch.arange(101.0)[:, None] * (2 * math.pi / torch.tensor(_PERIODS))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


# Which cell each row of four patches states: one that lies near. There are 8 lines of 8 patches.
CELLS_OF_ROWS = (
    (0, 2), (1, 1), (0, 2),
    (3, 5), (4, 4),
    (6, 8), (7, 7), (6, 8),
)  # fmt: skip


def cells_of_rows() -> Tensor:
    """The cell that each of the 16 rows of a picture states."""
    return torch.tensor(CELLS_OF_ROWS).flatten()


@dataclass(frozen=True)
class Batch:
    """Placed scenes with their labels. `corners` are 0 to 100; -1 in a cell without a shape."""

    placed: tuple[PlacedScene, ...]
    cells: Tensor  # (N, 9, 3)
    corners: Tensor  # (N, 9, 4)
    backgrounds: Tensor  # (N,)

    @classmethod
    def draw(cls, size: int, rng: random.Random, *, crowded: float = 0.0) -> "Batch":
        """Random scenes that are not held out."""
        placed = []
        for _ in range(size):
            is_crowded = rng.random() < crowded
            scene = crowded_scene(rng) if is_crowded else scenes.random_scene(rng, held_out=False)
            placed.append(PlacedScene(scene, scenes.place_shapes(scene, rng)))
        corners = torch.full((size, NUM_CELLS, NUM_CORNERS), -1)
        for index, each in enumerate(placed):
            for shape, box in zip(each.scene.shapes, each.boxes, strict=True):
                corners[index, shape.cell] = torch.tensor(box)
        return cls(
            tuple(placed),
            torch.tensor([cell_labels(each.scene) for each in placed]),
            corners,
            torch.tensor([BACKGROUNDS.index(each.scene.background) for each in placed]),
        )

    def to(self, device: torch.device) -> "Batch":
        """The same, with the labels of cells there."""
        labels = (each.to(device) for each in (self.cells, self.corners, self.backgrounds))
        return Batch(self.placed, *labels)

    def pictures(self, rng: random.Random, side: int) -> Tensor:
        """(N, 3, side, side) uint8."""
        return torch.stack([picture(p.scene, p.outlines, rng, side) for p in self.placed])

    def patches(self, side: int) -> Tensor:
        """What lies under the middle of side × side patches: (N, side², 3)."""
        return torch.stack([
            torch.from_numpy(patch_labels(p.scene, p.outlines, side)) for p in self.placed
        ])  # fmt: skip


class KnownBoxRows(nn.Module):
    """Rows that state a scene with its boxes outright, in place of a picture's rows."""

    @torch.no_grad()
    def __init__(self, hidden_size: int, tables: Sequence[Tensor], length: float) -> None:
        """`tables` are those of `fit_tables`; each corner is a wave of that length in its way."""
        super().__init__()
        self.known = KnownRows(hidden_size)
        own = (*self.known.tables, self.known.places, self.known.backgrounds)
        for table, weight in zip(own, tables, strict=True):
            assert isinstance(table, nn.Embedding)
            table.weight.copy_(weight)
        ways = torch.randn(NUM_CORNERS, NUM_WAVES, hidden_size)
        self.corners = length * functional.normalize(waves() @ ways, dim=-1)
        self.cells = cells_of_rows()

    def forward(self, batch: Batch) -> Tensor:
        """(N, R, hidden)."""
        rows = self.known(batch.cells, batch.backgrounds)
        cells, background = rows[:, :NUM_CELLS], rows[:, NUM_CELLS:]
        is_there = (batch.corners >= 0).float()[..., None]
        which = torch.arange(NUM_CORNERS)
        corners = (self.corners[which, batch.corners.clamp(min=0)] * is_there).sum(2)
        stated: Tensor = (cells + corners)[:, self.cells] + 0.5 * background
        return stated


class BoxLooker(nn.Module):
    """The image side with its probes: each row learns to state the shape of its cell."""

    cells: Tensor
    waves: Tensor

    def __init__(self, model: MiniGPT4Model) -> None:
        super().__init__()
        width = model.config.projection_width
        self.vision = model.vision
        self.patch_probe = Probe(model.config.vision.hidden_size)
        self.row_probe = Probe(width)
        self.background = nn.Linear(width, len(BACKGROUNDS))
        self.corners = nn.Linear(width, NUM_CORNERS * NUM_WAVES)
        self.register_buffer("cells", cells_of_rows(), persistent=False)
        self.register_buffer("waves", waves(), persistent=False)

    def read(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels → patches (N, P, C) without the class row, and rows of several, side by side."""
        hidden = self.vision.ln_vision(self.vision.vit(pixels))[:, 1:]
        return hidden, hidden.reshape(len(pixels), len(self.cells), -1)

    def loss(self, patches: Tensor, rows: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss of all probes, and how much of it is right."""
        side = round(patches.shape[1] ** 0.5)
        patch_loss, _ = self.patch_probe.loss(patches, batch.patches(side).to(rows.device))
        row_loss, right = self.row_probe.loss(rows, batch.cells[:, self.cells])
        background = self.background(rows).flatten(0, 1)
        wanted = batch.backgrounds.repeat_interleave(rows.shape[1])
        corners = batch.corners[:, self.cells]
        said = self.corners(rows).unflatten(-1, (NUM_CORNERS, NUM_WAVES))
        is_there = corners >= 0
        missed = (said[is_there] - self.waves[corners[is_there]]).square().mean()
        with torch.no_grad():
            nearest = (said[is_there] @ self.waves.T).argmax(-1)
            off = (nearest - corners[is_there]).abs().float().mean()
        loss = patch_loss + row_loss + functional.cross_entropy(background, wanted) + 6 * missed
        return loss, {
            "missed": float(missed.detach()),
            "off": float(off),
            "rows": float(right.float().mean()),
            "pictures": float(right.all(-1).float().mean()),
        }


class BoxDialogues:
    """Placed scenes → token ids, and the weight of each in the loss."""

    def __init__(self, tokenizer: Tokenizer, *, length_discount: float) -> None:
        """A discount of 1 lets every answer count the same, one of 0 every id."""
        self.length_discount = length_discount
        self.encode: Callable[[str], list[int]] = lru_cache(maxsize=50_000)(tokenizer.encode)
        self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id
        # The tokenizer's own BOS, then the template's.
        self.before = [self.bos_id, self.bos_id, *self.encode(f"{TEMPLATE.user}<Img>")]

    def write(
        self, placed: PlacedScene, turns: int, rng: random.Random
    ) -> tuple[list[int], list[float]]:
        """The ids after the picture, and the weight of each; the user's ids weigh nothing.

        There are fewer turns where they would be too long.

        The BOS of the next turn has a weight: there the model should say EOS.
        """
        ids: list[int] = []
        weights: list[float] = []
        tasks = rng.choices([*SHARES], weights=[*SHARES.values()], k=turns)
        for turn, task in enumerate(tasks):
            question = box_scenes.ask(placed, task, rng)
            word = "" if task == "vqa" and rng.random() < 0.5 else f"[{task}] "
            asked = f"{word}{question.text}{TEMPLATE.assistant}"
            new = self.encode(f"</Img> {asked}" if turn == 0 else f"{TEMPLATE.user}{asked}")
            answer = [*self.encode(question.answer), self.bos_id]
            if turn and len(ids) + len(new) + len(answer) > LONGEST:
                break
            ids += new + answer
            weight = len(answer) ** -self.length_discount
            weights += [0.0] * len(new) + [weight] * len(answer)
        return ids, weights
