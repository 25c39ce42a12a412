"""Train the demo model from nothing and write its folder (see docs/demo-model.md).

python scripts/train_demo.py --stage look   # the image tower learns what lies where
python scripts/train_demo.py --stage talk   # the language model learns to speak of known scenes
python scripts/train_demo.py --stage join   # both together, end to end, on text alone
python scripts/train_demo.py --stage write  # float16 weights into --out

"look" and "talk" do not need each other and may run side by side. Every stage saves its state in
--work-dir and goes on from there when it is started again.
"""

import argparse
import io
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sentencepiece import SentencePieceTrainer
from torch import Tensor, nn
from torch.nn import functional

from minigpt4_runtime.checkpoint.folder import write_folder
from minigpt4_runtime.config import LanguageConfig, ModelConfig, QFormerConfig, VisionConfig
from minigpt4_runtime.evaluation import scenes
from minigpt4_runtime.evaluation.scenes import Outline, Scene, Shape
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model
from minigpt4_runtime.prompt import TEMPLATES
from minigpt4_runtime.tokenizer import Tokenizer

NUM_CELLS = len(scenes.PLACES)
COLOURS, SIZES, BACKGROUNDS = (
    tuple(names) for names in (scenes.COLOURS, scenes.SIZES, scenes.BACKGROUNDS)
)
# One label per attribute; 0 is "nothing here".
ATTRIBUTES = {"kind": scenes.KINDS, "colour": COLOURS, "size": SIZES}
TEMPLATE = TEMPLATES["vicuna"]


@dataclass(frozen=True)
class Plan:
    """How long and how fast one stage learns."""

    steps: int
    batch: int
    rate: float
    turns: int = 0


PLANS = {
    "look": Plan(steps=3200, batch=48, rate=1e-3),
    "talk": Plan(steps=2200, batch=16, rate=2e-3, turns=8),
    "join": Plan(steps=700, batch=16, rate=5e-4, turns=6),
}


def demo_config(vocab_size: int) -> ModelConfig:
    """Small enough for git, and of the same make as the published Vicuna variant."""
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


# --- the tokenizer ----------------------------------------------------------------------------


def train_tokenizer(path: Path) -> None:
    """Whole words of the scenes' language, and bytes for everything else a user may type."""
    rng = random.Random(0)
    lines = [TEMPLATE.system, TEMPLATE.separator, TEMPLATE.user, TEMPLATE.assistant] * 500
    lines += ["<Img>", "</Img> "] * 500
    for _ in range(4000):
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


# --- pictures and labels ----------------------------------------------------------------------


def crowded_scene(rng: random.Random) -> Scene:
    """Five to nine shapes: more to see at the price of one picture, and never a held-out scene."""
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
    """What stands in each of the nine cells."""
    there = {shape.cell: shape for shape in scene.shapes}
    return [label(there.get(cell)) for cell in range(NUM_CELLS)]


def patch_labels(scene: Scene, outlines: tuple[Outline, ...], side: int) -> np.ndarray:
    """What lies under the middle of each of side × side patches: (side², 3)."""
    middle = (np.arange(side) + 0.5) / side
    labels = np.zeros((side, side, 3), dtype=np.int64)
    for shape, outline in zip(scene.shapes, outlines, strict=True):
        near = np.hypot(middle[None, :] - outline.x, middle[:, None] - outline.y) < outline.radius
        labels[near] = label(shape)
    return labels.reshape(-1, 3)


# --- stage 1: look ----------------------------------------------------------------------------


class Probe(nn.Module):
    """Reads kind, colour and size off a row. Used in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, 1 + len(v)) for v in ATTRIBUTES.values())

    def loss(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(N, P, C) rows, (N, P, 3) labels → the loss, and whether each row is all right."""
        loss, right = torch.zeros((), device=rows.device), torch.ones_like(labels[..., 0]).bool()
        for index, head in enumerate(self.heads):
            logits = head(rows)
            loss = loss + functional.cross_entropy(
                logits.flatten(0, 1), labels[..., index].flatten()
            )
            right &= logits.argmax(-1) == labels[..., index]
        return loss, right


class Looker(nn.Module):
    """The tower and the Q-Former with their probes: query i learns to report cell i."""

    def __init__(self, model: MiniGPT4Model) -> None:
        super().__init__()
        self.vision = model.vision
        self.patch_probe = Probe(model.config.vision.hidden_size)
        self.cell_probe = Probe(model.config.qformer.hidden_size)
        self.background = nn.Linear(model.config.qformer.hidden_size, len(BACKGROUNDS))

    def read(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels → tower rows and Q-Former rows."""
        rows = self.vision.ln_vision(self.vision.vit(pixels))
        return rows, self.vision.qformer(rows)

    def cell_loss(
        self, queries: Tensor, cells: Tensor, backgrounds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """How well the queries report cells and background, and which pictures are all right."""
        loss, right = self.cell_probe.loss(queries[:, :NUM_CELLS], cells)
        logits = self.background(queries[:, NUM_CELLS])
        loss = loss + functional.cross_entropy(logits, backgrounds)
        return loss, right.all(-1) & (logits.argmax(-1) == backgrounds)


def look_batch(plan: Plan, config: VisionConfig, rng: random.Random, *, crowded: float):
    """Pictures with what is to be seen in them, as tensors."""
    pictures, cells, patches, backgrounds = [], [], [], []
    for _ in range(plan.batch):
        scene = crowded_scene(rng) if rng.random() < crowded else scenes.random_scene(
            rng, held_out=False)  # fmt: skip
        outlines = scenes.place_shapes(scene, rng)
        pictures.append(picture(scene, outlines, rng, config.image_size))
        cells.append(cell_labels(scene))
        patches.append(patch_labels(scene, outlines, config.image_size // config.patch_size))
        backgrounds.append(BACKGROUNDS.index(scene.background))
    return (
        torch.stack(pictures), torch.tensor(cells), torch.from_numpy(np.stack(patches)),
        torch.tensor(backgrounds),
    )  # fmt: skip


def look(run: "Run", model: MiniGPT4Model) -> None:
    """Pre-train the image side on what lies under each patch and in each cell."""
    looker = Looker(model).to(run.device)
    plan, config = PLANS["look"], model.config.vision

    def step(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        pictures, cells, patches, backgrounds = (
            part.to(run.device) for part in look_batch(plan, config, rng, crowded=0.8)
        )
        rows, queries = looker.read(normalise(pictures, config))
        patch_loss, patch_right = looker.patch_probe.loss(rows[:, 1:], patches)
        cell_loss, picture_right = looker.cell_loss(queries, cells, backgrounds)
        return patch_loss + cell_loss, {
            "patches": float(patch_right.float().mean()),
            "pictures": float(picture_right.float().mean()),
        }

    run.train("look", looker, step)


# --- stage 2: talk ----------------------------------------------------------------------------


class KnownRows(nn.Module):
    """Rows that state a scene outright, in place of what a picture would give."""

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
    """Where the meaning of words starts: all forms of a word near each other, rows near words.

    "star", "star " and "stars" are pieces that have nothing in common; that they are one word would
    have to be found out for every word anew. The same holds for rows and what they state.
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
        return total / max(len(words), 1) ** 0.5

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
            nn.init.normal_(rows.weight, std=0.4)
            rows.weight[1:] = 0.4 * torch.stack([self.of(name) for name in names])
        known.backgrounds.weight.copy_(
            0.4 * torch.stack([self.of(f"{name} background") for name in BACKGROUNDS])
        )
        known.places.weight.copy_(0.4 * torch.stack([self.of(p) for p in scenes.PLACES]))


class Dialogues:
    """Scenes → token ids with the places that are to be learnt."""

    def __init__(self, tokenizer: Tokenizer, describe_share: float) -> None:
        self.describe_share = describe_share
        self.encode: Callable[[str], list[int]] = lru_cache(maxsize=None)(tokenizer.encode)
        self.before = [tokenizer.bos_id, *self.encode(
            f"{TEMPLATE.system}{TEMPLATE.separator}{TEMPLATE.user}<Img>")]  # fmt: skip
        self.after = self.encode("</Img> ")

    @property
    def short_before(self) -> list[int]:
        """The same without the system's text, which says nothing about scenes."""
        return [self.before[0], *self.encode(f"{TEMPLATE.user}<Img>")]

    def write(self, scene: Scene, turns: int, rng: random.Random) -> tuple[list[int], list[float]]:
        """The ids after the image, and how much each counts; what the user says counts nothing."""
        ids, weights = list(self.after), [0.0] * len(self.after)

        def add(text: str, *, spoken: bool) -> None:
            new = self.encode(text)
            ids.extend(new)
            # Every answer counts the same, however long it is.
            weights.extend([1 / len(new) if spoken else 0.0] * len(new))

        for turn in range(turns):
            if turn == 0 and rng.random() < self.describe_share:
                asked, answer = scenes.ask_description(rng), scenes.describe(scene)
            else:
                question = scenes.ask(scene, rng)
                asked, answer = question.text, question.answer
            add(asked if turn == 0 else TEMPLATE.user + asked, spoken=False)
            add(TEMPLATE.separator + TEMPLATE.assistant, spoken=False)
            add(answer + TEMPLATE.separator, spoken=True)
        return ids, weights


def dense_attend(batch: int):
    """Causal attention for `batch` sequences of equal length, packed one after the other."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG001
        q, k, v = (x.view(batch, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def dialogue_loss(
    model: MiniGPT4Model,
    dialogues: list[tuple[list[int], list[float]]],
    before: list[int],
    rows: Tensor,
) -> tuple[Tensor, dict[str, float]]:
    """Next-token loss on what the model says, `rows` being the image rows of each dialogue."""
    longest, device = max(len(ids) for ids, _ in dialogues), rows.device
    tail = torch.zeros(len(rows), longest, dtype=torch.long)
    weights = torch.zeros(len(rows), longest)
    for index, (ids, counts) in enumerate(dialogues):
        tail[index, : len(ids)] = torch.tensor(ids)
        weights[index, : len(ids)] = torch.tensor(counts)
    tail, weights = tail.to(device), weights.to(device)
    head = torch.tensor(before, device=device).expand(len(rows), -1)
    language = model.language
    embeddings = torch.cat([language.embed(head), rows, language.embed(tail)], dim=1)
    positions = torch.arange(embeddings.shape[1], device=device).repeat(len(rows))
    hidden = language(embeddings.flatten(0, 1), positions, dense_attend(len(rows)))
    hidden = hidden.view(*embeddings.shape)[:, -longest - 1 : -1]
    said = weights > 0
    logits, wanted = language.logits(hidden[said]), tail[said]
    losses = functional.cross_entropy(logits, wanted, reduction="none")
    right = (logits.argmax(-1) == wanted).float()
    share = weights[said] / weights.sum()
    return (losses * share).sum(), {"tokens": float((right * share).sum())}


def talk(run: "Run", model: MiniGPT4Model, tokenizer: Tokenizer) -> None:
    """Train the language model on scenes that are stated outright."""
    plan, dialogues = PLANS["talk"], Dialogues(tokenizer, describe_share=0.25)
    known = KnownRows(model.config.language.hidden_size)
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    WordVectors(model.config.language.hidden_size).start(model, known, pieces)
    both = nn.ModuleDict({"language": model.language, "known": known}).to(run.device)

    def step(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        batch = [scenes.random_scene(rng, held_out=False) for _ in range(plan.batch)]
        cells = torch.tensor([cell_labels(scene) for scene in batch]).to(run.device)
        backgrounds = torch.tensor([BACKGROUNDS.index(s.background) for s in batch]).to(run.device)
        said = [dialogues.write(scene, plan.turns, rng) for scene in batch]
        return dialogue_loss(model, said, dialogues.short_before, known(cells, backgrounds))

    run.train("talk", both, step)


# --- stage 3: join ----------------------------------------------------------------------------


@torch.no_grad()
def fit_projection(run: "Run", looker: Looker, known: KnownRows, config: VisionConfig) -> None:
    """Start the projection where it turns Q-Former rows into known rows, by least squares."""
    rng, plan = random.Random(7), Plan(steps=1, batch=64, rate=0)
    queries, wanted = [], []
    for _ in range(40):
        pictures, cells, _, backgrounds = (
            part.to(run.device) for part in look_batch(plan, config, rng, crowded=0.3)
        )
        queries.append(looker.read(normalise(pictures, config))[1].flatten(0, 1))
        wanted.append(known(cells, backgrounds).flatten(0, 1))
    rows, targets = torch.cat(queries).double(), torch.cat(wanted).double()
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype, device=rows.device)], dim=1)
    gram = rows.T @ rows + 1e-3 * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    solution = torch.linalg.solve(gram, rows.T @ targets)
    missed = (rows @ solution - targets).square().mean() / targets.var(0).mean()
    print(json.dumps({"stage": "join", "unexplained": round(float(missed), 4)}), flush=True)
    projection = looker.vision.projection
    projection.weight.copy_(solution[:-1].T.float())
    projection.bias.copy_(solution[-1].float())


def join(run: "Run", model: MiniGPT4Model, tokenizer: Tokenizer) -> None:
    """Train the whole model end to end on text; the cells are still asked, at a low weight."""
    plan, dialogues, config = PLANS["join"], Dialogues(tokenizer, 0.5), model.config.vision
    looker, known = Looker(model), KnownRows(model.config.language.hidden_size)
    # What "look" did not train, the projection, is fitted below.
    looked = {k: v for k, v in run.saved_weights("look").items() if "projection" not in k}
    looker.load_state_dict(looked, strict=False)
    nn.ModuleDict({"language": model.language, "known": known}).load_state_dict(
        run.saved_weights("talk")
    )
    whole = nn.ModuleDict({"model": model, "looker": looker, "known": known}).to(run.device)
    fit_projection(run, looker, known, config)

    def step(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        batch = [scenes.random_scene(rng, held_out=False) for _ in range(plan.batch)]
        outlines = [scenes.place_shapes(scene, rng) for scene in batch]
        pictures = torch.stack(
            [picture(s, o, rng, config.image_size) for s, o in zip(batch, outlines, strict=True)]
        ).to(run.device)
        cells = torch.tensor([cell_labels(scene) for scene in batch]).to(run.device)
        backgrounds = torch.tensor([BACKGROUNDS.index(s.background) for s in batch]).to(run.device)
        _, queries = looker.read(normalise(pictures, config))
        cell_loss, right = looker.cell_loss(queries, cells, backgrounds)
        rows = model.vision.projection(queries)
        said = [dialogues.write(scene, plan.turns, rng) for scene in batch]
        loss, seen = dialogue_loss(model, said, dialogues.before, rows)
        return loss + 0.1 * cell_loss, {**seen, "pictures": float(right.float().mean())}

    run.train("join", whole, step)


def write(run: "Run", model: MiniGPT4Model, tokenizer_path: Path, out_dir: Path) -> None:
    """Write what "join" has made as a model folder, in float16."""
    prefix = "model."
    weights = {
        name.removeprefix(prefix): weight
        for name, weight in run.saved_weights("join").items()
        if name.startswith(prefix)
    }
    write_folder(out_dir, model.config, weights, tokenizer_path, dtype="float16", force=True)


# --- running a stage --------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Where a stage works and what it goes on from."""

    work_dir: Path
    device: torch.device
    seed: int

    def saved_weights(self, stage: str) -> dict[str, Tensor]:
        """The weights that a stage ended with, or has reached."""
        return torch.load(self.work_dir / f"{stage}.pt", map_location="cpu", weights_only=True)[
            "weights"
        ]

    def train(self, stage: str, module: nn.Module, step_loss) -> None:
        """Warm-up and a cosine, gradient clipping, and a saved state to go on from."""
        plan, path = PLANS[stage], self.work_dir / f"{stage}.pt"
        optimisers = make_optimisers(module, plan.rate)
        first = 0
        if path.exists():
            saved = torch.load(path, map_location=self.device, weights_only=True)
            module.load_state_dict(saved["weights"])
            for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(state)
            first = saved["step"]
        started = time.perf_counter()
        seen: dict[str, float] = {}
        for step in range(first, plan.steps):
            warm = min(1.0, (step + 1) / 200)
            rate = (
                plan.rate * warm * (0.03 + 0.97 * (1 + math.cos(math.pi * step / plan.steps)) / 2)
            )
            for group in (g for optimiser in optimisers for g in optimiser.param_groups):
                group["lr"] = rate
            # A step's scenes depend on the seed and its number alone, so a resumed run is the same.
            loss, numbers = step_loss(random.Random(f"{self.seed}/{stage}/{step}"))
            module.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
            for name, value in {"loss": float(loss.detach()), **numbers}.items():
                seen[name] = 0.98 * seen.get(name, value) + 0.02 * value
            if (step + 1) % 50 == 0:
                report = {name: round(value, 4) for name, value in seen.items()}
                pace = (step + 1 - first) * plan.batch / (time.perf_counter() - started)
                print(json.dumps({"stage": stage, "step": step + 1, **report,
                                  "scenes_per_second": round(pace, 1)}), flush=True)  # fmt: skip
            if (step + 1) % 250 == 0 or step + 1 == plan.steps:
                states = [optimiser.state_dict() for optimiser in optimisers]
                state = {"weights": module.state_dict(), "optimisers": states, "step": step + 1}
                torch.save(state, path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)


def make_optimisers(module: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the language model's matrices, AdamW for all else.

    With AdamW alone the language model took several times as long to learn to look things up.
    """
    matrices, others = [], []
    for name, weight in module.named_parameters():
        is_matrix = "language.layers" in name and weight.dim() == 2
        (matrices if is_matrix else others).append(weight)
    adamw = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


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
    with torch.no_grad():
        for layer in model.language.layers:
            # Keys that start near queries let a word find its like (Trockman and Kolter, 2023).
            nn.init.orthogonal_(layer.attention.query.weight)
            noise = torch.randn_like(layer.attention.key.weight) * 160**-0.5
            layer.attention.key.weight.copy_(0.5 * layer.attention.query.weight + 0.7 * noise)
            layer.attention.out.weight.mul_((2 * len(model.language.layers)) ** -0.5)
            layer.mlp_down.weight.mul_((2 * len(model.language.layers)) ** -0.5)


def main() -> None:
    """Run the stages that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stage", required=True, choices=["look", "talk", "join", "write"])
    parser.add_argument("--work-dir", type=Path, default=Path("build/demo"))
    parser.add_argument("--out", type=Path, default=Path("src/minigpt4_runtime/assets/demo"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's own")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer_path = args.work_dir / "tokenizer.model"
    if not tokenizer_path.exists():
        train_tokenizer(tokenizer_path)
    tokenizer = Tokenizer(tokenizer_path)
    torch.manual_seed(args.seed)
    model = MiniGPT4Model(demo_config(tokenizer.vocab_size))
    initialise(model)
    run = Run(args.work_dir, torch.device(args.device), args.seed)
    if args.stage == "look":
        look(run, model)
    elif args.stage == "talk":
        talk(run, model, tokenizer)
    elif args.stage == "join":
        join(run, model, tokenizer)
    else:
        write(run, model, tokenizer_path, args.out)


if __name__ == "__main__":
    main()
