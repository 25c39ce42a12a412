"""The training of a projection, a Q-Former or LoRA, from a .jsonl of dialogues to an adapter.

Owns   the steps, and a training's files: features, state, losses, samples and the result.
Takes  a model folder, data and settings; gives the path of projection.safetensors, or where the
       language model has adapters, of the folder.
Never  loses a step that was done: Ctrl-C, a bad loss and a full disk leave the last state.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt4_runtime import __version__
from minigpt4_runtime.checkpoint.adapter import NAMES, QFORMER, encode_adapter
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.checkpoint.folder import check_above
from minigpt4_runtime.checkpoint.graph_folder import vision_digest
from minigpt4_runtime.checkpoint.manifest import MANIFEST_NAME, read_manifest
from minigpt4_runtime.config import DTYPE_NAMES
from minigpt4_runtime.engine.engine import is_out_of_memory
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.ranks import open_rank_device
from minigpt4_runtime.report.files import write_whole
from minigpt4_runtime.tune.data import Example, TuningData
from minigpt4_runtime.tune.events import Events
from minigpt4_runtime.tune.features import picture_features
from minigpt4_runtime.tune.learner import Learner
from minigpt4_runtime.tune.lora import check_rank, write_lora
from minigpt4_runtime.tune.samples import Samples
from minigpt4_runtime.tune.settings import TuneSettings
from minigpt4_runtime.tune.state import STATE_NAME, check_state, resume_state, save_state
from minigpt4_runtime.tune.together import Alone, Processes, sum_over, told_once

RESULT_NAME = "projection.safetensors"
LOSSES_NAME = "losses.csv"
_NO_MEMORY = (
    "The memory does not suffice for step {step}. What was done is kept: go on with --resume and a "
    "lower --at-once, or with --recompute."
)


@dataclass(frozen=True)
class Step:
    """A step that is done. `loss` is what the batch had before it: the mean -log p of answers' ids.

    `num_tokens` of prompts, pictures and answers were read in `seconds`. `held_out` is the loss of
    the data that are not learned from, behind the step, where it was measured.
    """

    number: int
    of: int
    loss: float
    rate: float
    num_tokens: int
    seconds: float
    held_out: float | None = None


@dataclass(frozen=True)
class Tuned:
    """How a training ended: `adapter` is None where it was stopped before its last step.

    `peak_bytes` is the most memory of this process that the device held, where that is known.
    """

    steps: int
    adapter: Path | None
    peak_bytes: int | None = None


def tune(  # noqa: PLR0913 - what a training is made of, and who listens.
    model_dir: Path,
    data: TuningData,
    out_dir: Path,
    settings: TuneSettings,
    *,
    device: str = "auto",
    dtype: str = "auto",
    processes: Processes | None = None,
    resume: bool = False,
    save_every: int = 100,
    held_out: TuningData | None = None,
    eval_every: int = 100,
    samples: int = 0,
    on_picture: Callable[[], None] = lambda: None,
    on_step: Callable[[Step], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Tuned:
    """Train what the settings say. After a stop, `resume` goes on as if there had been none.

    The loss of `held_out` is measured after every `eval_every` steps and the last. So many
    `samples` of it, or else of `data`, are answered before the first step and after the last. Of
    several `processes` each calls this with the same; the first writes and is told of steps.

    Raises:
        ConfigError: a setting has no meaning, the folder cannot be written or holds another
            training, or the loss is no number.
        CheckpointError: `model_dir` is no model folder, or the folder cannot be made.
        BackendUnavailableError: the device is not on this machine.
        SystemExit: another process raises one of these, before the first step.
    """
    processes = processes or Alone()
    with told_once(processes):
        backend = open_rank_device(device, processes.size)
        name = _dtype_name(dtype, backend.facts.default_dtype)
        _check_folder(out_dir, resume=resume)
        _refuse(model_dir, settings, processes.size)
        base = vision_digest(model_dir)
        record = {
            "manifest": hashlib.sha256((model_dir / MANIFEST_NAME).read_bytes()).hexdigest(),
            "base": base, "data": data.digest, "dtype": name, **settings.to_mapping(),
        }  # fmt: skip
        if resume:
            check_state(out_dir, record)
    processes.use(backend.facts.collective)
    backend.reset_peak_memory()
    encode = partial(
        _features, processes,
        model_dir=model_dir, base=base, out_dir=out_dir, device=backend.device,
        before_qformer=settings.train == "qformer", on_picture=on_picture,
    )  # fmt: skip
    features = encode(data)
    measured = (held_out, encode(held_out)) if held_out else None
    learner = Learner.load(
        model_dir, settings, device=backend.device, dtype=getattr(torch, name), processes=processes
    )
    training = Training(learner, data, features, settings, processes)
    done = resume_state(out_dir, learner, training.optimiser) if resume else 0
    spoken = Samples(
        out_dir, model_dir, *(measured or (data, features)), count=samples, processes=processes
    )
    if not done:  # It has learned nothing yet.
        spoken.take("before", learner)
    diary = _Diary(out_dir, training, record, done, writes=processes.rank == 0)
    done = diary.tell_of(
        (_measured(each, training, measured, eval_every)
         for each in training.steps(done, should_stop)),
        on_step, save_every,
    )  # fmt: skip
    peak_bytes = backend.peak_memory_bytes()
    if done < settings.steps:
        return Tuned(done, None, peak_bytes)
    made = {
        "model": model_dir.resolve().name, "made_by": f"minigpt4-runtime {__version__}",
        "examples": len(data.examples),
    }  # fmt: skip
    result = None
    if processes.rank == 0:
        result = _write_result(out_dir, learner, settings, {**record, **made})
    spoken.take("after", learner, should_stop)
    return Tuned(done, result, peak_bytes)


def _measured(
    step: Step, training: Training, held_out: tuple[TuningData, Tensor] | None, every: int
) -> Step:
    if held_out and (step.number % every == 0 or step.number == step.of):
        return replace(step, held_out=training.measure(*held_out))
    return step


def _features(processes: Processes, data: TuningData, **given: Any) -> Tensor:
    """The first process computes and writes them, and then all have them."""
    if processes.rank:
        processes.least(0)
        return picture_features(data, **given)
    features = picture_features(data, **given)
    processes.least(0)
    return features


def _write_result(
    out_dir: Path, learner: Learner, settings: TuneSettings, record: Mapping[str, Any]
) -> Path:
    """The file of the image side, and around it the folder of LoRA; what there is of both."""
    if settings.train != "none":
        qformer = {n: each for n, each in learner.learned.items() if n.startswith(f"{QFORMER}.")}
        weight, bias = (learner.learned[name] for name in NAMES)
        write_whole(out_dir / RESULT_NAME, encode_adapter(weight, bias, record, qformer))
    if not settings.lora:
        return out_dir / RESULT_NAME
    write_lora(out_dir, learner.adapters, settings, record)
    return out_dir


def _dtype_name(dtype: str, default: str) -> str:
    name = default if dtype == "auto" else dtype
    if name not in DTYPE_NAMES:
        raise ConfigError(f"dtype is {dtype!r}; it must be auto or {', '.join(DTYPE_NAMES)}.")
    return name


def _refuse(model_dir: Path, settings: TuneSettings, num_processes: int) -> None:
    """What cannot be, before pictures are encoded."""
    if settings.batch_size < num_processes:
        raise ConfigError(
            f"batch_size is {settings.batch_size}, and {num_processes} processes share a batch: "
            "some would have nothing to learn from. Raise batch_size."
        )
    if settings.divide and num_processes == 1:
        raise ConfigError(
            "divide is given, and this process is alone: there is nobody to hold the other shares. "
            "Start several with torchrun, or leave it out."
        )
    formats = read_manifest(model_dir).weight_format
    by_part = {"language": formats} if isinstance(formats, str) else formats
    language = {name for part, name in by_part.items() if part.startswith("language")}
    if rounding := sorted(name for name in language if "a8" in name):
        raise ConfigError(
            f"{model_dir} holds weights in {', '.join(rounding)}, which rounds what it multiplies "
            "and lets no gradient pass. Tune a model of floats, w8a16 or w4a16."
        )
    config = load_config(model_dir)
    if settings.train == "qformer" and config.qformer is None:
        raise ConfigError(
            f"train is 'qformer', and {model_dir} has none, as it groups patches. Train the "
            "projection."
        )
    check_rank(settings, config.language)
    if settings.lora and config.language.adapters is not None:
        raise ConfigError(
            f"{model_dir} keeps LoRA adapters beside its weights, and can take no others. Take "
            "the folder that `merge` was given, or convert without --keep-lora."
        )


class Training:
    """A learner and its optimiser, AdamW as the original has it: biases and norms do not decay."""

    def __init__(
        self,
        learner: Learner,
        data: TuningData,
        features: Tensor,
        settings: TuneSettings,
        processes: Processes | None = None,
    ) -> None:
        self._processes = processes or Alone()
        self.learner, self._data, self._features = learner, data, features
        self._settings = settings
        decays: dict[bool, list[Tensor]] = {True: [], False: []}
        for each in learner.learned.values():
            decays[each.ndim > 1].append(each)
        groups = [
            {"params": decays[True], "weight_decay": settings.weight_decay},
            {"params": decays[False], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.999))

    def steps(self, first: int, should_stop: Callable[[], bool]) -> Iterator[Step]:
        """Those from `first` on, until the last; or until one of the processes is to stop."""
        for number in range(first, self._settings.steps):
            if not self._processes.least(not should_stop()):
                return
            yield self.step(number)

    def step(self, number: int) -> Step:
        """Learn from one batch: the mean loss over all ids of its answers.

        Raises:
            ConfigError: the loss is no number. Nothing has changed then.
        """
        started = time.perf_counter()
        loss, num_tokens = self.gradients(number)
        rate = self._settings.rate(number)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        seconds = time.perf_counter() - started
        return Step(number + 1, self._settings.steps, loss, rate, num_tokens, seconds)

    def gradients(self, number: int) -> tuple[float, int]:
        """Leave a step's gradients in the learner; its loss, and how many tokens were read.

        They are the same in all processes, each of which computes its part of the batch.
        """
        chosen = self._settings.batch(number, len(self._data.examples))
        examples = [self._data.examples[index] for index in chosen]
        num_said = sum(len(each.answer_ids) for each in examples)
        self.optimiser.zero_grad()
        total, num_tokens = 0.0, 0
        for some, is_own in self._rounds(examples):
            loss, count = self.learner.losses(some, self._features)
            (loss * is_own / num_said).backward()  # type: ignore[no-untyped-call]
            if is_own:
                total, num_tokens = total + float(loss.detach()), num_tokens + count
        grads = [each.grad for each in self.learner.learned.values() if each.grad is not None]
        counted = torch.tensor([total, num_tokens], dtype=torch.float32, device=grads[0].device)
        sum_over(self._processes, [*grads, counted])
        if self._processes.size > 1:
            total, num_tokens = float(counted[0]), int(counted[1])
        if not all(bool(torch.isfinite(grad).all()) for grad in grads):
            places = ", ".join(each.place for each in examples)
            raise ConfigError(
                f"Step {number + 1} has no finite gradient ({places}; its loss is "
                f"{total / num_said:g}). It was not taken. Lower --lr, or take --dtype float32."
            )
        return total / num_said, num_tokens

    def _rounds(self, examples: Sequence[Example]) -> Iterator[tuple[Sequence[Example], bool]]:
        """This process's part of some examples, so many as are computed at once.

        All processes have as many rounds, for weights that are divided come from all of them. Who
        has nothing left gets an example that is not its own, to be counted as 0.
        """
        at_once, size = self._settings.at_once, self._processes.size
        mine = examples[self._processes.rank :: size]
        for first in range(0, -(-len(examples) // size), at_once):
            some = mine[first : first + at_once]
            yield some or examples[:1], bool(some)

    @torch.no_grad()
    def measure(self, data: TuningData, features: Tensor) -> float:
        """The mean loss over all ids of the answers of other data, of all processes together."""
        total = 0.0
        for some, is_own in self._rounds(data.examples):
            loss = float(self.learner.losses(some, features)[0])
            total += loss if is_own else 0.0
        if self._processes.size > 1:
            device = self.learner.image_end.projection.weight.device
            total = float(self._processes.sum(torch.tensor([total], device=device)))
        return total / sum(len(each.answer_ids) for each in data.examples)


class _Diary:
    """What the first process writes while all train: state and losses. The others write nothing."""

    def __init__(
        self,
        out_dir: Path,
        training: Training,
        record: Mapping[str, Any],
        done: int,
        *,
        writes: bool,
    ) -> None:
        self._out_dir, self._training, self._record, self._done = out_dir, training, record, done
        self._losses = _Losses(out_dir, done) if writes else None

    def tell_of(
        self, steps: Iterable[Step], on_step: Callable[[Step], None], save_every: int
    ) -> int:
        """Take the steps, until they end or one fails; how many are done then. All are kept.

        Raises:
            ConfigError: the loss is no number, the memory does not suffice, or the disk is full.
        """
        try:
            for step in steps:
                self._done = step.number
                if self._losses:
                    self._losses.add(step)
                    on_step(step)
                if step.number % save_every == 0:
                    self._keep()
        except Exception as error:
            self._keep()  # The step that failed has changed nothing.
            if is_out_of_memory(error):
                raise ConfigError(_NO_MEMORY.format(step=self._done + 1)) from error
            raise
        self._keep()
        return self._done

    def _keep(self) -> None:
        if self._losses:
            training = self._training
            save_state(
                self._out_dir, training.learner, training.optimiser, self._done, self._record
            )
            self._losses.write()


class _Losses:
    """The loss of each step as a table and as events, which go on where a training does."""

    def __init__(self, out_dir: Path, steps_done: int) -> None:
        self._path = path = out_dir / LOSSES_NAME
        self._events = Events(out_dir, steps_done)
        before = path.read_text("utf-8").splitlines() if steps_done and path.is_file() else []
        self._lines = ["step,loss,rate,held_out", *before[1 : steps_done + 1]]

    def add(self, step: Step) -> None:
        held_out = "" if step.held_out is None else f"{step.held_out:.6f}"
        self._events.add(step)
        self._lines.append(f"{step.number},{step.loss:.6f},{step.rate:.6g},{held_out}")

    def write(self) -> None:
        write_whole(self._path, "\n".join(self._lines) + "\n")
        self._events.flush()


def _check_folder(out_dir: Path, *, resume: bool) -> None:
    if os.path.lexists(out_dir) and not out_dir.is_dir():
        raise ConfigError(f"--out is {out_dir}, which is no folder. Name one for the training.")
    if not resume and os.path.lexists(out_dir / STATE_NAME):
        raise ConfigError(
            f"{out_dir} holds a training. Go on with --resume, or name another folder."
        )
    check_above(out_dir / STATE_NAME)
