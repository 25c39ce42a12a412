"""Hold the folder of `minigpt4 tune --lora` to PEFT itself, which the package does not need.

    python scripts/check_peft.py

It needs `transformers` and `peft`. It trains LoRA on all matrices of the demo model for some steps,
exports the language model, has PEFT lay the adapter over transformers' Llama, and compares the
logits of random ids with those of the model that was trained. It fails where they differ.
"""

import json
import random
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.evaluation import scenes
from minigpt4_runtime.export.language import export_language
from minigpt4_runtime.model.causal import causal_attention
from minigpt4_runtime.tune.data import read_data
from minigpt4_runtime.tune.learner import Learner
from minigpt4_runtime.tune.settings import LORA_TARGETS, TuneSettings
from minigpt4_runtime.tune.state import resume_state
from minigpt4_runtime.tune.tune import tune

TOLERANCE = 1e-4
SETTINGS = TuneSettings(
    steps=8, batch_size=1, lr=5e-3, warmup_steps=1, train="none", lora=4, lora_targets=LORA_TARGETS
)


def trained(folder: Path) -> Learner:
    """The model as it was when training ended, from the training's own state."""
    picture = {"type": "image_url", "image_url": {"url": str(drawn_scene(folder))}}
    said = [
        {"role": "user", "content": [picture, "What is this?"]},
        {"role": "assistant", "content": "Une image."},
    ]
    path = folder / "train.jsonl"
    path.write_text(json.dumps({"messages": said}), "utf-8")
    tune(DEMO_MODEL_DIR, read_data(path, DEMO_MODEL_DIR), folder / "mine", SETTINGS, device="cpu")
    learner = Learner.load(
        DEMO_MODEL_DIR, SETTINGS, device=torch.device("cpu"), dtype=torch.float32
    )
    resume_state(folder / "mine", learner, torch.optim.AdamW(learner.learned.values()))
    return learner


def drawn_scene(folder: Path) -> Path:
    """A drawn scene."""
    rng = random.Random(1)
    path = folder / "scene.png"
    scenes.draw(scenes.random_scene(rng, held_out=False), rng).save(path)
    return path


@torch.no_grad()
def main() -> None:
    """Compare, and say by how much the logits differ."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with torch.enable_grad():
            language = trained(folder).language
        export_language(DEMO_MODEL_DIR, folder / "language")
        plain = LlamaForCausalLM.from_pretrained(folder / "language", dtype=torch.float32)
        ids = torch.randint(3, language.config.vocab_size, (1, 50))
        before = plain(ids).logits[0]
        theirs = PeftModel.from_pretrained(plain, folder / "mine").eval()(ids).logits[0]
        hidden = language(language.embed(ids[0]), torch.arange(50), causal_attention())
        ours = language.logits(hidden)
    difference, change = float((ours - theirs).abs().max()), float((ours - before).abs().max())
    print(
        f"LoRA changed logits by up to {change:.2g}; PEFT's differ from ours by {difference:.2g}."
    )
    if difference > TOLERANCE or change < 100 * TOLERANCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
