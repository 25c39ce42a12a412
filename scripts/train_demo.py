"""Train the demo model from scratch and write its folder (see docs/demo-model.md).

python scripts/train_demo.py                # all stages, one after the other
python scripts/train_demo.py --stage look   # train the image tower on the positions of shapes
python scripts/train_demo.py --stage talk   # train the language model on known scenes
python scripts/train_demo.py --stage join   # train both together, end to end, on dialogues
python scripts/train_demo.py --stage write  # float16 weights into --out

"look" and "talk" are independent and may run at the same time. Every stage saves its state in
--work-dir and continues from there when it is started again.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_lessons import (
    BACKGROUNDS,
    Dialogues,
    cell_labels,
    crowded_scene,
    normalise,
    patch_labels,
    picture,
    train_tokenizer,
)
from demo_parts import KnownRows, Looker, WordVectors, demo_config, initialise
from torch import Tensor, nn
from torch.nn import functional

from minigpt4_runtime.checkpoint.blank_model import blank_model, list_weights
from minigpt4_runtime.checkpoint.folder import write_folder
from minigpt4_runtime.config import ModelConfig, VisionConfig
from minigpt4_runtime.evaluation import scenes
from minigpt4_runtime.model.causal import causal_attention
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model, VisionPart
from minigpt4_runtime.text.tokenizer import Tokenizer

StepLoss = Callable[[random.Random], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Plan:
    """The length and the learning rate of one stage."""

    steps: int
    batch: int
    rate: float
    turns: int = 0
    warm_up: int = 200
    vision_share: float = 1.0  # The image side's share of `rate`.


STAGES = ("look", "talk", "join", "write")
PLANS = {
    "look": Plan(steps=3200, batch=48, rate=1e-3),
    "talk": Plan(steps=4500, batch=16, rate=2e-3, turns=8),
    "join": Plan(steps=1600, batch=16, rate=1e-3, turns=6, vision_share=0.05),
}

FITTED_BATCHES = 40  # Of 64 pictures each, on which the projection is fitted before stage 3.


# --- stage 1: look ----------------------------------------------------------------------------


def look_batch(
    plan: Plan, config: VisionConfig, rng: random.Random, *, crowded: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, and the labels of their cells, patches and backgrounds."""
    pictures, cells, patches, backgrounds = [], [], [], []
    for _ in range(plan.batch):
        is_crowded = rng.random() < crowded
        scene = crowded_scene(rng) if is_crowded else scenes.random_scene(rng, held_out=False)
        outlines = scenes.place_shapes(scene, rng)
        pictures.append(picture(scene, outlines, rng, config.image_size))
        cells.append(cell_labels(scene))
        patches.append(patch_labels(scene, outlines, config.image_size // config.patch_size))
        backgrounds.append(BACKGROUNDS.index(scene.background))
    return (
        torch.stack(pictures), torch.tensor(cells), torch.from_numpy(np.stack(patches)),
        torch.tensor(backgrounds),
    )  # fmt: skip


def look(run: "StageRun", model: MiniGPT4Model) -> None:
    """Pre-train the image side on the labels of each patch and cell."""
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


def dialogue_loss(
    model: MiniGPT4Model,
    dialogues: list[tuple[list[int], list[float]]],
    before: list[int],
    rows: Tensor,
    *,
    said_for: tuple[int, int] = (-1, -1),
) -> tuple[Tensor, dict[str, float]]:
    """Next-token loss on the model's turns; `rows` are the image rows of each dialogue.

    `said_for`: where the first of these ids is read next, the model should say the second.
    """
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
    hidden = language(embeddings.flatten(0, 1), positions, causal_attention(len(rows)))
    hidden = hidden.view(*embeddings.shape)[:, -longest - 1 : -1]
    said = weights > 0
    logits, wanted = language.logits(hidden[said]), tail[said]
    wanted = wanted.masked_fill(wanted == said_for[0], said_for[1])
    losses = functional.cross_entropy(logits, wanted, reduction="none")
    right = (logits.argmax(-1) == wanted).float()
    share = weights[said] / weights.sum()
    return (losses * share).sum(), {"tokens": float((right * share).sum())}


def talk(run: "StageRun", model: MiniGPT4Model, tokenizer: Tokenizer) -> None:
    """Train the language model on rows that encode scenes directly."""
    plan = PLANS["talk"]
    dialogues = Dialogues(tokenizer, describe_share=0.25, length_discount=0.7, place_share=0.35)
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


def solve(rows: Tensor, targets: Tensor) -> Tensor:
    """The matrix, in float64, that takes rows (N, C) nearest to targets (N, D): (C, D)."""
    rows, targets = rows.double(), targets.double()
    gram = rows.T @ rows + 1e-3 * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    solution: Tensor = torch.linalg.solve(gram, rows.T @ targets)
    return solution


@torch.no_grad()
def aim_projection(vision: VisionPart, features: Tensor, wanted: Tensor) -> None:
    """Set the projection to what takes features nearest to wanted rows."""
    rows = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
    solution = solve(rows, wanted)
    missed = (rows @ solution.float() - wanted).square().mean() / wanted.var(0).mean()
    print(json.dumps({"stage": "join", "unexplained": round(float(missed), 4)}), flush=True)
    projection = vision.projection
    assert projection.bias is not None
    projection.weight.copy_(solution[:-1].T.float())
    projection.bias.copy_(solution[-1].float())


@torch.no_grad()
def fit_projection(run: "StageRun", looker: Looker, known: KnownRows, config: VisionConfig) -> None:
    """Initialise the projection from Q-Former rows to known rows by least squares."""
    rng, plan = random.Random(7), Plan(steps=1, batch=64, rate=0)
    queries, wanted = [], []
    for _ in range(FITTED_BATCHES):
        pictures, cells, _, backgrounds = (
            part.to(run.device) for part in look_batch(plan, config, rng, crowded=0.3)
        )
        queries.append(looker.read(normalise(pictures, config))[1].flatten(0, 1))
        wanted.append(known(cells, backgrounds).flatten(0, 1))
    aim_projection(looker.vision, torch.cat(queries), torch.cat(wanted))


def join(run: "StageRun", model: MiniGPT4Model, tokenizer: Tokenizer) -> None:
    """Train the whole model end to end on text, and on cells with a low weight."""
    plan, config = PLANS["join"], model.config.vision
    dialogues = Dialogues(tokenizer, describe_share=0.7, length_discount=0.5, place_share=0.4)
    looker, known = Looker(model), KnownRows(model.config.language.hidden_size)
    # The projection, which "look" did not train, is fitted below.
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


def write(
    run: "StageRun", config: ModelConfig, stage: str, tokenizer_path: Path, out_dir: Path
) -> None:
    """Write the result of the last stage as a model folder, in float16."""
    names = {weight.name for weight in list_weights(blank_model(config))}
    saved = {name.removeprefix("model."): w for name, w in run.saved_weights(stage).items()}
    weights = {name: weight for name, weight in saved.items() if name in names}
    write_folder(out_dir, config, weights, tokenizer_path, dtype="float16", force=True)


# --- running a stage --------------------------------------------------------------------------


@dataclass(frozen=True)
class StageRun:
    """A stage's folder, and the state that it continues from."""

    work_dir: Path
    device: torch.device
    seed: int
    plans: Mapping[str, Plan]

    def has_begun(self, stage: str) -> bool:
        """Whether there is a state of this stage to continue from."""
        return (self.work_dir / f"{stage}.pt").exists()

    def saved_weights(self, stage: str) -> dict[str, Tensor]:
        """A stage's final weights."""
        path = self.work_dir / f"{stage}.pt"
        if not path.exists():
            raise SystemExit(f"error: {path} does not exist. Run --stage {stage} first.")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["step"] < self.plans[stage].steps:
            raise SystemExit(f"error: {path} is unfinished. Run --stage {stage} to its end.")
        weights: dict[str, Tensor] = saved["weights"]
        return weights

    def train(self, stage: str, module: nn.Module, step_loss: StepLoss) -> None:
        """Train with warm-up, a cosine and gradient clipping, and save the state."""
        plan, path = self.plans[stage], self.work_dir / f"{stage}.pt"
        optimisers = make_optimisers(module, plan)
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
            warm = min(1.0, (step + 1) / plan.warm_up)
            rate = (
                plan.rate * warm * (0.03 + 0.97 * (1 + math.cos(math.pi * step / plan.steps)) / 2)
            )
            for group in (g for optimiser in optimisers for g in optimiser.param_groups):
                group["lr"] = rate * group["share"]
            # A step's scenes depend on the seed and its number alone, so a resumed run is the same.
            loss, numbers = step_loss(random.Random(f"{self.seed}/{stage}/{step}"))
            module.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
            for name, value in {"loss": float(loss.detach()), **numbers}.items():
                seen[name] = 0.98 * seen.get(name, value) + 0.02 * value
            if (step + 1) % 25 == 0:
                report = {name: round(value, 4) for name, value in seen.items()}
                pace = (step + 1 - first) * plan.batch / (time.perf_counter() - started)
                print(json.dumps({"stage": stage, "step": step + 1, **report,
                                  "scenes_per_second": round(pace, 1)}), flush=True)  # fmt: skip
            if (step + 1) % 50 == 0 or step + 1 == plan.steps:
                states = [optimiser.state_dict() for optimiser in optimisers]
                state = {"weights": module.state_dict(), "optimisers": states, "step": step + 1}
                torch.save(state, path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)


def make_optimisers(module: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the language model's matrices, AdamW for all others.

    With AdamW alone the language model took longer to learn look-ups (docs/log.md).
    """
    matrices, seeing, others = [], [], []
    for name, weight in module.named_parameters():
        if "language.layers" in name and weight.dim() == 2:
            matrices.append(weight)
        elif "vision" in name and "projection" not in name:
            seeing.append(weight)
        else:
            others.append(weight)
    groups = [{"params": others, "share": 1.0}, {"params": seeing, "share": plan.vision_share}]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=(0.9, 0.98), weight_decay=0.02
        )
    ]
    if matrices:
        muon = [{"params": matrices, "share": 1.0}]
        optimisers.append(torch.optim.Muon(muon, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"))
    return optimisers


def run_stage(stage: str, run: "StageRun", tokenizer_path: Path, out_dir: Path) -> None:
    """Run one stage on a model that starts from the seed."""
    tokenizer = Tokenizer(tokenizer_path)
    torch.manual_seed(run.seed)
    model = MiniGPT4Model(demo_config(tokenizer.vocab_size))
    initialise(model)
    if stage == "look":
        look(run, model)
    elif stage == "talk":
        talk(run, model, tokenizer)
    elif stage == "join":
        join(run, model, tokenizer)
    else:
        write(run, model.config, "join", tokenizer_path, out_dir)


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    stages: tuple[str, ...]
    work_dir: Path
    out: Path
    device: torch.device
    seed: int


def read_options(about: str, stages: tuple[str, ...], name: str) -> Options:
    """Read the command line of the training of the bundled model of this name."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stage", default="all", choices=["all", *stages])
    parser.add_argument("--work-dir", type=Path, default=Path("build") / name)
    parser.add_argument("--out", type=Path, default=Path("src/minigpt4_runtime/assets") / name)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's own")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    chosen = stages if args.stage == "all" else (args.stage,)
    return Options(chosen, args.work_dir, args.out, torch.device(args.device), args.seed)


def main() -> None:
    """Run the selected stages."""
    options = read_options(__doc__ or "", STAGES, "demo")
    tokenizer_path = options.work_dir / "tokenizer.model"
    if not tokenizer_path.exists():
        train_tokenizer(tokenizer_path)
    run = StageRun(options.work_dir, options.device, options.seed, PLANS)
    for stage in options.stages:
        run_stage(stage, run, tokenizer_path, options.out)


if __name__ == "__main__":
    main()
