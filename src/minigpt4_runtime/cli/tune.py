"""`minigpt4 tune`: dialogues about pictures in, an adapter for a model out."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4_runtime.cli.options import flag, option, spread_options
from minigpt4_runtime.cli.terminal import ProgressBar, note, progress_bar
from minigpt4_runtime.errors import BackendUnavailableError, ConfigError
from minigpt4_runtime.tune.settings import TuneSettings

if TYPE_CHECKING:
    from minigpt4_runtime.tune.data import Example, TuningData
    from minigpt4_runtime.tune.together import Processes
    from minigpt4_runtime.tune.tune import Step, Tuned

SAMPLES_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """The settings of a training."""

    steps: Annotated[int, option("COUNT", "How many batches to learn from.")] = TuneSettings.steps
    batch_size: Annotated[int, option("COUNT", "How many answers a step learns from.")] = (
        TuneSettings.batch_size
    )
    at_once: Annotated[
        int, option("COUNT", "How many of them are in memory at a time; this changes nothing else.")
    ] = TuneSettings.at_once
    lr: Annotated[
        float,
        option("NUMBER", "The largest rate of learning. --fresh needs a larger one: 1e-4 and up."),
    ] = TuneSettings.lr
    min_lr: Annotated[float, option("NUMBER", "The rate at the end.")] = TuneSettings.min_lr
    warmup_lr: Annotated[float, option("NUMBER", "The rate at the beginning.")] = (
        TuneSettings.warmup_lr
    )
    warmup_steps: Annotated[int, option("COUNT", "Over how many steps the rate rises to --lr.")] = (
        TuneSettings.warmup_steps
    )
    weight_decay: Annotated[float, option("NUMBER", "How strongly weights are drawn to 0.")] = (
        TuneSettings.weight_decay
    )
    seed: Annotated[int, option("NUMBER", "The order of the examples.")] = TuneSettings.seed
    fresh: Annotated[
        bool, flag("Begin with a projection drawn at random, not with the model's.", "--fresh")
    ] = False
    recompute: Annotated[
        bool,
        flag(
            "Compute each layer again on the way back: slower by a third, in far less memory.",
            "--recompute",
        ),
    ] = False
    divide: Annotated[
        bool,
        flag(
            "Let each of several processes hold its share of the language model's weights alone, "
            "for a model that is too large for one device.",
            "--divide",
        ),
    ] = False

    train: Annotated[
        str,
        option(
            "PART",
            "What of the image side learns: projection; qformer, which is the Q-Former and the "
            "projection; or none, with --lora.",
        ),
    ] = TuneSettings.train
    lora: Annotated[
        int, option("RANK", "Train adapters of that rank on the language model too. 0: none.")
    ] = TuneSettings.lora
    lora_alpha: Annotated[
        float, option("NUMBER", "What adapters add counts this, divided by the rank.")
    ] = TuneSettings.lora_alpha
    lora_targets: Annotated[
        str,
        option(
            "NAMES",
            "Which matrices have adapters, with commas between them: q_proj, k_proj, v_proj, "
            "o_proj, gate_proj, up_proj, down_proj.",
        ),
    ] = ",".join(TuneSettings.lora_targets)

    def settings(self) -> TuneSettings:
        """All of it, checked.

        Raises:
            ConfigError: a value has no meaning.
        """
        targets = tuple(each.strip() for each in self.lora_targets.split(","))
        return TuneSettings(**{**asdict(self), "lora_targets": targets})


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is learned from, and what is shown of it."""

    data: Annotated[
        Path,
        option(
            "PATH",
            "A .jsonl with a dialogue on each line (docs/tuning.md says how), LLaVA's JSON, or a "
            "folder with the original's filter_cap.json.",
        ),
    ]
    images: Annotated[
        Path | None,
        option("DIR", "Where paths of pictures count from. Without it, the folder of --data."),
    ] = None
    held_out: Annotated[
        Path | None,
        option("PATH", "Data like --data, which are not learned from: their loss is shown."),
    ] = None
    eval_every: Annotated[
        int, option("COUNT", "Measure --held-out after every so many steps.", min=1)
    ] = 100
    samples: Annotated[
        int,
        option(
            "COUNT",
            "So many examples, of --held-out if there is one, are answered before the first step "
            "and after the last, for the page.",
            min=0,
        ),
    ] = 4
    check_data: Annotated[
        bool, flag("Only check the data, and show ten samples of it.", "--check-data")
    ] = False

    def read(self, model_dir: Path, settings: TuneSettings) -> tuple[TuningData, TuningData | None]:
        """What is learned from and what is held out, both checked.

        Raises:
            ConfigError: something of it cannot be learned from.
        """
        from minigpt4_runtime.tune.data import read_data

        found = [
            read_data(each, model_dir, pictures=self.images, needs_pictures=not settings.lora)
            for each in (self.data, self.held_out) if each is not None
        ]  # fmt: skip
        return found[0], found[1] if self.held_out else None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a training computes, and where it is kept."""

    out: Annotated[
        Path | None, option("DIR", "The folder of the training: its state and its result.")
    ] = None
    resume: Annotated[bool, flag("Go on with the training in --out.", "--resume")] = False
    save_every: Annotated[
        int, option("COUNT", "Keep the state after every so many steps.", min=1)
    ] = 100
    device: Annotated[str, option("DEVICE", "auto, cpu, cuda, cuda:INDEX or npu.")] = "auto"
    dtype: Annotated[
        str,
        option(
            "DTYPE",
            "What the language model computes in: auto, float32, float16 or bfloat16. What learns "
            "is float32.",
        ),
    ] = "auto"
    processes: Annotated[
        int | None,
        option(
            "COUNT",
            "How many processes share each batch, with one device each. torchrun or `accelerate "
            "launch` starts them; without this, as many as they started.",
            min=1,
        ),
    ] = None


@spread_options
def tune(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            help="A model folder, or the name of a fetched one. Without it, the demo model.",
            show_default=False,
        ),
    ] = None,
    *,
    source: DataOptions,
    run: RunOptions,
    options: TuneOptions,
) -> None:
    """Train a model on your own pictures and words.

    The projection learns, and all else stays as it is, as in the original's second stage; --train
    and --lora change that. Ctrl-C keeps what was learned, and --resume goes on. Answer with the
    result by `--adapter`.
    """
    from minigpt4_runtime.api import DEMO_MODEL_DIR
    from minigpt4_runtime.checkpoint.shelf import find_model
    from minigpt4_runtime.tune.together import joined, told_once
    from minigpt4_runtime.tune.tune import tune as tune_model

    with joined(run.processes) as group:
        with told_once(group):
            settings = options.settings()
            if run.out is None and not source.check_data:
                raise ConfigError(
                    "--out is missing: name a folder for the training, or --check-data."
                )
            model_dir = DEMO_MODEL_DIR if model is None else find_model(model)
            data, held_out = source.read(model_dir, settings)
        if not group.rank:
            _tell_of(data, source.data)
        if source.check_data or run.out is None:
            _show_samples(() if group.rank else data.examples)
            return
        num_pictures = sum(len(each.pictures) for each in (data, held_out) if each)
        with progress_bar(0 if group.rank else num_pictures) as bar, _asks(group) as asked:
            tuned = tune_model(
                model_dir, data, run.out, settings,
                device=run.device, dtype=run.dtype, processes=group, resume=run.resume,
                save_every=run.save_every, held_out=held_out, eval_every=source.eval_every,
                samples=source.samples, on_picture=bar.advance,
                on_step=_Teller(settings.steps, bar), should_stop=asked,
            )  # fmt: skip
        if group.rank:
            return
    facts = {
        "model": model_dir.name, "data": source.data, "answers": len(data.examples),
        "held out": source.held_out or "–", "steps done": tuned.steps, **asdict(settings),
        "lora_targets": ", ".join(settings.lora_targets),
    }  # fmt: skip
    _write_page(run.out, facts)
    _report(tuned, run.out, model)


def _tell_of(data: TuningData, path: Path) -> None:
    from minigpt4_runtime.checkpoint.weights import count

    answers, pictures = count(data.examples, "answer"), count(data.pictures, "picture")
    note(f"{path}: {answers} about {pictures}.")


def _write_page(out: Path, facts: dict[str, object]) -> None:
    """A training is whole without a page: only say why there is none."""
    try:
        from minigpt4_runtime.tune.page import write_page

        note(f"The page of the training is {write_page(out, facts)}.")
    except (BackendUnavailableError, ConfigError) as error:
        note(f"There is no page of the training: {error}")


def _show_samples(examples: Sequence[Example]) -> None:
    for example in examples[:SAMPLES_SHOWN]:
        print(f"{example.place}: {example.text}")
        print(f"  → {example.answer}")


def _report(tuned: Tuned, out: Path, model: Path | None) -> None:
    if tuned.peak_bytes is not None:
        note(f"It took {tuned.peak_bytes / 2**30:.1f} GiB of memory at most.")
    if tuned.adapter is None:
        note(f"Stopped after {tuned.steps} steps, which are kept in {out}. Go on with --resume.")
        raise typer.Exit(130)
    print(tuned.adapter, flush=True)
    where = "" if model is None else f" --model {shlex.quote(str(model))}"
    adapter = shlex.quote(str(tuned.adapter))
    note(f"Try it: minigpt4 describe PICTURE{where} --adapter {adapter}")


class _Teller:
    """Tells of a twentieth of the steps at a time: their mean loss and their speed."""

    def __init__(self, steps: int, bar: ProgressBar) -> None:
        self._every = max(1, steps // 20)
        self._bar = bar
        self._steps: list[Step] = []

    def __call__(self, step: Step) -> None:
        self._steps.append(step)
        if step.held_out is not None:
            with self._bar.aside():
                note(f"step {step.number}: the loss of --held-out is {step.held_out:.4f}")
        if step.number % self._every and step.number != step.of:
            return
        loss = sum(each.loss for each in self._steps) / len(self._steps)
        seconds = sum(each.seconds for each in self._steps)
        speed = sum(each.num_tokens for each in self._steps) / seconds
        left = seconds / len(self._steps) * (step.of - step.number)
        with self._bar.aside():
            note(
                f"step {step.number} of {step.of}: loss {loss:.4f}, {speed:.0f} tokens/s, "
                f"{left:.0f} s left"
            )
        self._steps.clear()


@contextmanager
def _asks(processes: Processes) -> Iterator[Callable[[], bool]]:
    """While this lasts, the first Ctrl-C only asks to stop: a step ends whole. A second one stops.

    Until a step asks for it, nothing is lost by stopping at once.
    """
    asked = threading.Event()
    is_asking = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def ask(*_: object) -> None:
        is_at_once = asked.is_set() or not is_asking.is_set()
        asked.set()
        if is_at_once:
            raise KeyboardInterrupt
        if not processes.rank:
            note("Stopping after this step …")

    def should_stop() -> bool:
        is_asking.set()
        return asked.is_set()

    signal.signal(signal.SIGINT, ask)
    try:
        yield should_stop
    except Exception as error:
        # A package that Ctrl-C meets while it is imported may pass over it, or fail otherwise.
        if asked.is_set() and not is_asking.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
