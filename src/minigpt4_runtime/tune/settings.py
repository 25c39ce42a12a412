"""The settings of a training, and what follows from them for each step.

Owns   TuneSettings, the learning rate of a step, and the examples of its batch.
Takes  numbers alone; the defaults are those of the original's second stage.
Never  loads torch: the command line reads the defaults here.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from random import Random
from typing import Any, Literal, get_args

from minigpt4_runtime.config import Range
from minigpt4_runtime.errors import ConfigError

Part = Literal["projection", "qformer", "none"]
# A language model's matrices, by the names that other programs have for them.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_RANGES = {
    "steps": Range(int, 1),
    "batch_size": Range(int, 1),
    "at_once": Range(int, 1),
    "lr": Range(float, above=0),
    "min_lr": Range(float, 0),
    "warmup_lr": Range(float, 0),
    "warmup_steps": Range(int, 0),
    "weight_decay": Range(float, 0),
    "seed": Range(int, 0, 2**63 - 1),
    "lora": Range(int, 0),
    "lora_alpha": Range(float, above=0),
}


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How a model is trained (upstream: train_configs/minigpt4_stage2_finetune.yaml).

    `train` says what of the image side learns: its projection, the Q-Former too, or nothing. `lora`
    is the rank of the adapters on the language model's matrices `lora_targets`, which count
    `lora_alpha` / rank; 0: it stays as it is.

    The rate of learning rises in a line from `warmup_lr` to `lr` over `warmup_steps` steps, and
    falls as a cosine to `min_lr`. `fresh` begins with a projection drawn at random.

    Three change the memory and the order of sums alone: of a batch, `at_once` sequences are
    computed side by side; with `recompute` a layer keeps only what it was given, and is computed
    again on the way back; with `divide` each of several processes holds its share of the language
    model's weights.
    """

    steps: int = 1000
    batch_size: int = 12
    at_once: int = 4
    lr: float = 3e-5
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_steps: int = 200
    weight_decay: float = 0.05
    seed: int = 0
    fresh: bool = False
    recompute: bool = False
    divide: bool = False
    train: Part = "projection"
    lora: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        """Refuse values that have no meaning, by name."""
        for name, allowed in _RANGES.items():
            allowed.check(name, getattr(self, name))
        for name in ("min_lr", "warmup_lr"):
            if getattr(self, name) > self.lr:
                raise ConfigError(
                    f"{name} is {getattr(self, name):g}, above lr, which is {self.lr:g}. Lower "
                    f"{name} or raise lr."
                )
        if self.warmup_steps >= self.steps > 1:
            raise ConfigError(
                f"warmup_steps is {self.warmup_steps}, and there are {self.steps} steps: lr would "
                "never be reached. Lower warmup_steps or raise steps."
            )
        self._check_parts()

    def _check_parts(self) -> None:
        if self.train not in get_args(Part):
            raise ConfigError(
                f"train is {self.train!r}; it must be {', '.join(get_args(Part)[:-1])} or none."
            )
        for name in self.lora_targets or ("",):
            if name not in LORA_TARGETS or self.lora_targets.count(name) > 1:
                raise ConfigError(
                    f"lora_targets is {','.join(self.lora_targets)!r}; it must be one or more of "
                    f"{', '.join(LORA_TARGETS)}, each once."
                )
        if self.train == "none" and not self.lora:
            raise ConfigError("train is 'none' and lora is 0: nothing would learn. Give lora.")
        for name in ("lora_alpha", "lora_targets"):
            if not self.lora and getattr(self, name) != getattr(type(self), name):
                raise ConfigError(
                    f"{name} is given, and lora, the rank, is not: no adapter would learn. Give "
                    "both or neither."
                )
        if self.train == "none" and self.fresh:
            raise ConfigError(
                "fresh draws a projection, and train is 'none', so that it would not learn. Leave "
                "one of both out."
            )

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for records."""
        return asdict(self)

    def rate(self, step: int) -> float:
        """The rate of learning of a step, counted from 0.

        As in the original (upstream: common/optims.py), the cosine runs from the first step on and
        the warm-up stands in its place at first.
        """
        if step < self.warmup_steps:
            return self.warmup_lr + (self.lr - self.warmup_lr) * step / self.warmup_steps
        half_turn = math.cos(math.pi * step / self.steps)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + half_turn)

    def batch(self, step: int, num_examples: int) -> list[int]:
        """Which examples a step learns from: all come once, in a new order, before any comes again.

        This depends on the seed and the step alone, so that a training goes on as it would have.
        """
        first = step * self.batch_size
        endless = self._endless(first // num_examples, num_examples)
        skipped = first % num_examples
        return list(islice(endless, skipped, skipped + self.batch_size))

    def _endless(self, epoch: int, num_examples: int) -> Iterator[int]:
        while True:
            order = list(range(num_examples))
            Random(f"{self.seed} {epoch}").shuffle(order)
            yield from order
            epoch += 1
