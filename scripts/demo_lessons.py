"""The demo model's training data: images with labels, and dialogues about them.

Owns   the demo model's tokenizer, and the scenes as numbers: images, labels, token ids.
Takes  a random.Random; the same state gives the same data.
"""

import io
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sentencepiece import SentencePieceTrainer
from torch import Tensor

from minigpt4_runtime.config import VisionConfig
from minigpt4_runtime.evaluation import scenes
from minigpt4_runtime.evaluation.scenes import Outline, Scene, Shape
from minigpt4_runtime.text.prompt import TEMPLATES
from minigpt4_runtime.text.tokenizer import Tokenizer

NUM_CELLS = len(scenes.PLACES)
COLOURS, SIZES, BACKGROUNDS = (
    tuple(names) for names in (scenes.COLOURS, scenes.SIZES, scenes.BACKGROUNDS)
)
# One label per attribute; 0 is "nothing here".
ATTRIBUTES = {"kind": scenes.KINDS, "colour": COLOURS, "size": SIZES}
TEMPLATE = TEMPLATES["vicuna"]
TOKENIZER_SCENES = 4000


def train_tokenizer(path: Path) -> None:
    """A tokenizer with the words of the scenes, and bytes for all other text."""
    rng = random.Random(0)
    lines = [TEMPLATE.system, TEMPLATE.separator, TEMPLATE.user, TEMPLATE.assistant] * 500
    lines += ["<Img>", "</Img> "] * 500
    for _ in range(TOKENIZER_SCENES):
        scene = scenes.random_scene(rng, held_out=False)
        lines += [scenes.describe(scene), scenes.ask_description(rng)]
        for question in (scenes.ask(scene, rng) for _ in range(4)):
            lines += [question.text, question.answer]
    model = io.BytesIO()
    # A space belongs to the word before it, so that a dialogue has the same ids whether it is
    # tokenised turn by turn, as it is spoken, or as a whole, as its history is read.
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=640,
        hard_vocab_limit=False, byte_fallback=True, treat_whitespace_as_suffix=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
        normalization_rule_name="identity", character_coverage=1.0,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


def crowded_scene(rng: random.Random) -> Scene:
    """Five to nine shapes: more labels in one image, and never a held-out scene."""
    cells = sorted(rng.sample(range(NUM_CELLS), rng.randint(5, NUM_CELLS)))
    shapes = tuple(
        Shape(rng.choice(scenes.KINDS), rng.choice(COLOURS), rng.choice(SIZES), cell)
        for cell in cells
    )
    return Scene(shapes, rng.choice(BACKGROUNDS))


def picture(scene: Scene, outlines: tuple[Outline, ...], rng: random.Random, size: int) -> Tensor:
    """Draw at a random size and shrink as `pixels.load` would: (3, S, S) uint8."""
    drawn = scenes.draw(scene, rng, side=rng.randint(192, 288), outlines=outlines)
    shrunk = drawn.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(shrunk).copy()).permute(2, 0, 1)


def normalise(pictures: Tensor, config: VisionConfig) -> Tensor:
    """(N, 3, S, S) uint8 → float32, as the model reads it."""
    mean = torch.tensor(config.image_mean, device=pictures.device).view(3, 1, 1)
    std = torch.tensor(config.image_std, device=pictures.device).view(3, 1, 1)
    return (pictures.float() / 255 - mean) / std


def label(shape: Shape | None) -> tuple[int, int, int]:
    """Kind, colour and size as numbers, 0 for nothing."""
    if shape is None:
        return 0, 0, 0
    return (
        1 + scenes.KINDS.index(shape.kind),
        1 + COLOURS.index(shape.colour),
        1 + SIZES.index(shape.size),
    )


def cell_labels(scene: Scene) -> list[tuple[int, int, int]]:
    """The labels of the nine cells."""
    there = {shape.cell: shape for shape in scene.shapes}
    return [label(there.get(cell)) for cell in range(NUM_CELLS)]


def patch_labels(scene: Scene, outlines: tuple[Outline, ...], side: int) -> np.ndarray:
    """The labels under the centre of each of side × side patches: (side², 3)."""
    middle = (np.arange(side) + 0.5) / side
    labels = np.zeros((side, side, 3), dtype=np.int64)
    for shape, outline in zip(scene.shapes, outlines, strict=True):
        near = np.hypot(middle[None, :] - outline.x, middle[:, None] - outline.y) < outline.radius
        labels[near] = label(shape)
    return labels.reshape(-1, 3)


class Dialogues:
    """Scenes → token ids, and the weight of each in the loss."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        describe_share: float,
        length_discount: float,
        place_share: float = 0.0,
    ) -> None:
        """Set the topics of dialogues, and the weight of ids in long answers.

        `describe_share` of them begin with a description, and `place_share` of the questions are
        drawn again until they ask about places. A discount of 1 lets every answer count the same,
        one of 0 every id.
        """
        self.describe_share = describe_share
        self.place_share = place_share
        self.length_discount = length_discount
        self.encode: Callable[[str], list[int]] = lru_cache(maxsize=None)(tokenizer.encode)
        self.before = [tokenizer.bos_id, *self.encode(
            f"{TEMPLATE.system}{TEMPLATE.separator}{TEMPLATE.user}<Img>")]  # fmt: skip
        self.after = self.encode("</Img> ")

    @property
    def short_before(self) -> list[int]:
        """The same without the system's text, which says nothing about scenes."""
        return [self.before[0], *self.encode(f"{TEMPLATE.user}<Img>")]

    def write(self, scene: Scene, turns: int, rng: random.Random) -> tuple[list[int], list[float]]:
        """The ids after the image, and the weight of each; the user's ids weigh nothing."""
        ids, weights = list(self.after), [0.0] * len(self.after)

        def add(text: str, *, spoken: bool) -> None:
            new = self.encode(text)
            ids.extend(new)
            weights.extend([len(new) ** -self.length_discount if spoken else 0.0] * len(new))

        for turn in range(turns):
            if turn == 0 and rng.random() < self.describe_share:
                asked, answer = scenes.ask_description(rng), scenes.describe(scene)
            else:
                question = scenes.ask(scene, rng)
                if rng.random() < self.place_share:
                    while question.kind not in ("where", "what is beside"):
                        question = scenes.ask(scene, rng)
                asked, answer = question.text, question.answer
            add(asked if turn == 0 else TEMPLATE.user + asked, spoken=False)
            add(TEMPLATE.separator + TEMPLATE.assistant, spoken=False)
            add(answer + TEMPLATE.separator, spoken=True)
        return ids, weights
