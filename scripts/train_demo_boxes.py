"""Train the demo model with boxes and write its folder (see docs/demo-model.md).

python scripts/train_demo_boxes.py                # all stages, one after the other
python scripts/train_demo_boxes.py --stage look   # the image tower, on the boxes of shapes
python scripts/train_demo_boxes.py --stage talk   # the projection and the language model
python scripts/train_demo_boxes.py --stage write  # float16 weights into --out
python scripts/train_demo_boxes.py --stage polish # go on from the weights in --out, and write again

It starts from the first demo model. Every stage saves its state in --work-dir and continues from
there when it is started again.
"""

import random
from dataclasses import replace

import torch
from box_lessons import (
    NEW_PIECES,
    NUMBERS,
    Batch,
    BoxDialogues,
    BoxLooker,
    KnownBoxRows,
    extend_tokenizer,
    waves,
)
from demo_lessons import ATTRIBUTES, BACKGROUNDS, NUM_CELLS, normalise
from demo_parts import initialise
from torch import Tensor
from torch.nn import functional
from train_demo import (
    Plan,
    StageRun,
    aim_projection,
    dialogue_loss,
    read_options,
    solve,
    write,
)

from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.checkpoint.load import load_model
from minigpt4_runtime.config import ModelConfig, VisionConfig
from minigpt4_runtime.model.minigpt4 import MiniGPT4Model
from minigpt4_runtime.text.tokenizer import Tokenizer

PLANS = {
    "look": Plan(steps=1200, batch=32, rate=1e-3, warm_up=50),
    "talk": Plan(steps=1250, batch=32, rate=1.2e-3, turns=8, warm_up=30),
    "polish": Plan(steps=2500, batch=32, rate=7e-4, turns=8, warm_up=50),
}
STAGES = ("look", "talk", "write", "polish")
FITTED_SCENES = 1500
CORNER_SHARE = 0.5  # The length of each corner in a known row, in lengths of a row.


def box_config(first: ModelConfig, vocab_size: int) -> ModelConfig:
    """The first demo model's sizes in the layout of MiniGPT-v2."""
    language = replace(first.language, vocab_size=vocab_size)
    return replace(first, qformer=None, language=language, template="minigptv2")


@torch.no_grad()
def start(first: MiniGPT4Model, vocab_size: int) -> MiniGPT4Model:
    """A model with the first one's weights. Numbers start as waves, so that near ones are near."""
    model = MiniGPT4Model(box_config(first.config, vocab_size))
    initialise(model)
    known, own = first.state_dict(), model.state_dict()
    for name, weight in own.items():
        if name in ("language.token_embedding.weight", "language.head.weight"):
            _extend(weight, known[name])
        elif name in known and known[name].shape == weight.shape:
            weight.copy_(known[name])
    return model


def _extend(weight: Tensor, known: Tensor) -> None:
    length = float(known.norm(dim=1).mean())
    weight[: len(known)] = known
    new = torch.randn(len(NEW_PIECES), known.shape[1])
    # The table and the head have the same waves.
    ways = torch.randn(waves().shape[1], known.shape[1], generator=torch.Generator().manual_seed(3))
    new[-len(NUMBERS) :] = waves() @ ways
    weight[len(known) :] = length * functional.normalize(new, dim=1)


@torch.no_grad()
def fit_tables(first: MiniGPT4Model) -> tuple[list[Tensor], float]:
    """What the first model's rows are the sum of: kind, colour, size, place; and backgrounds.

    And the usual length of a row.
    """
    rng, config = random.Random(5), first.config.vision
    batch = Batch.draw(FITTED_SCENES, rng)
    pictures = batch.pictures(rng, config.image_size)
    rows = torch.cat([first.vision(normalise(part, config)) for part in torch.split(pictures, 100)])
    counts = [*(1 + len(names) for names in ATTRIBUTES.values()), NUM_CELLS]
    stated = torch.cat(
        [batch.cells, torch.arange(NUM_CELLS).expand(FITTED_SCENES, -1)[..., None]], -1
    )
    columns = [functional.one_hot(stated[..., i], n).flatten(0, 1) for i, n in enumerate(counts)]
    wanted = rows[:, :NUM_CELLS].flatten(0, 1)
    tables = list(torch.split(solve(torch.cat(columns, 1), wanted).float(), counts))
    states = functional.one_hot(batch.backgrounds, len(BACKGROUNDS))
    tables.append(solve(states, rows[:, NUM_CELLS]).float())
    return tables, float(wanted.norm(dim=1).mean())


def look(run: StageRun, model: MiniGPT4Model) -> None:
    """Train the image side on the shape and the box of each cell."""
    plan, config = PLANS["look"], model.config.vision
    looker = BoxLooker(model).to(run.device)

    def step(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        batch = Batch.draw(plan.batch, rng, crowded=0.8).to(run.device)
        pictures = normalise(batch.pictures(rng, config.image_size).to(run.device), config)
        return looker.loss(*looker.read(pictures), batch)

    run.train("look", looker, step)


@torch.no_grad()
def fit_projection(looker: BoxLooker, known: KnownBoxRows, config: VisionConfig) -> None:
    """Start the projection where it turns the tower's rows into known rows."""
    rng, features, wanted = random.Random(7), [], []
    for _ in range(FITTED_SCENES // 50):
        batch = Batch.draw(50, rng, crowded=0.3)
        pictures = normalise(batch.pictures(rng, config.image_size), config)
        features.append(looker.read(pictures)[1].flatten(0, 1))
        wanted.append(known(batch).flatten(0, 1))
    aim_projection(looker.vision, torch.cat(features), torch.cat(wanted))


def talk(run: StageRun, model: MiniGPT4Model, first: MiniGPT4Model, tokenizer: Tokenizer) -> None:
    """Start the projection at known rows, and learn from dialogues."""
    config = model.config.vision
    looker = BoxLooker(model)
    looked = {k: v for k, v in run.saved_weights("look").items() if "projection" not in k}
    looker.load_state_dict(looked, strict=False)
    if not run.has_begun("talk"):
        tables, length = fit_tables(first)
        known = KnownBoxRows(model.config.language.hidden_size, tables, CORNER_SHARE * length)
        fit_projection(looker, known, config)
    learn(run, "talk", model, tokenizer)


def learn(run: StageRun, stage: str, model: MiniGPT4Model, tokenizer: Tokenizer) -> None:
    """Train the projection and the language model on dialogues; the tower stays as it is."""
    plan, config = PLANS[stage], model.config.vision
    dialogues = BoxDialogues(tokenizer, length_discount=0.5)
    model.requires_grad_(True).vision.requires_grad_(False).projection.requires_grad_(True)
    model.to(run.device)

    def step(rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        batch = Batch.draw(plan.batch, rng)
        pictures = normalise(batch.pictures(rng, config.image_size).to(run.device), config)
        said = [dialogues.write(placed, plan.turns, rng) for placed in batch.placed]
        ends = (dialogues.bos_id, dialogues.eos_id)
        rows = model.vision(pictures)
        return dialogue_loss(model, said, dialogues.before, rows, said_for=ends)

    run.train(stage, model, step)


def main() -> None:
    """Run the selected stages."""
    options = read_options(__doc__ or "", STAGES, "demo-boxes")
    tokenizer_path = options.work_dir / "tokenizer.model"
    extend_tokenizer(DEMO_MODEL_DIR / "tokenizer.model", tokenizer_path)
    run = StageRun(options.work_dir, options.device, options.seed, PLANS)
    for stage in options.stages:
        torch.manual_seed(run.seed)
        tokenizer = Tokenizer(tokenizer_path)
        first = load_model(DEMO_MODEL_DIR, device=torch.device("cpu"), dtype=torch.float32)
        model = start(first, tokenizer.vocab_size)
        if stage == "look":
            look(run, model)
        elif stage == "talk":
            talk(run, model, first, tokenizer)
        elif stage == "write":
            write(run, model.config, "talk", tokenizer_path, options.out)
        else:
            model = load_model(options.out, device=torch.device("cpu"), dtype=torch.float32)
            learn(run, stage, model, tokenizer)
            write(run, model.config, stage, tokenizer_path, options.out)


if __name__ == "__main__":
    main()
