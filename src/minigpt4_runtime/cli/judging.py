"""What the commands of `minigpt4 evaluate` share.

Owns   their options, the ledger with its bar, and how a report is shown.
Takes  options and reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from minigpt4_runtime.cli.options import ModelOptions, option
from minigpt4_runtime.cli.terminal import ProgressBar, note, progress_bar, show_report
from minigpt4_runtime.cli.terminal import report as report_error
from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.report.files import ReportFolder

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4
    from minigpt4_runtime.evaluation.asking import Question
    from minigpt4_runtime.evaluation.judge import Judge
    from minigpt4_runtime.report.files import Report
    from minigpt4_runtime.report.ledger import Ledger

Q = TypeVar("Q", bound="Question")

OutDir = Annotated[
    Path | None,
    option(
        "DIR",
        "Write the report into this folder: a page (.html), everything (.json), a row for "
        "each thing judged (.csv), and what is judged so far (.jsonl), from which the same "
        "command goes on after a stop.",
    ),
]
ImagesDir = Annotated[Path, option("DIR", "The folder with the pictures.")]
JudgeDevice = Annotated[
    str,
    option("DEVICE", "Where the judge runs: auto, cpu, cuda, …"),
]


Prompt = Annotated[
    str,
    option(
        "TEXT",
        "How to ask; {question} stands for the question. With <ImageHere> for the picture it is "
        "taken as it is, without the model's template.",
    ),
]


def load_judge(path: Path, device: str) -> Judge:
    """The CLIP model at this path."""
    note(f"Loading the judge from {path} …")
    from minigpt4_runtime.evaluation.judge import Judge

    return Judge.load(path, device=device)


def name_model(where: ModelOptions, model: MiniGPT4, sampling: SamplingParams | None = None) -> str:
    """The model in words, with every given option, as each may change answers.

    An adapter has its digests beside it: its files may change under the same name. Of the
    `sampling` too what is not usual, but for the answer's length.
    """
    options = {**asdict(where), "device": model.device, "dtype": model.dtype}
    options["model"] = where.model or "demo"
    if where.adapter is not None:
        from minigpt4_runtime.checkpoint.adapters import AdapterParts

        digests = AdapterParts.find(where.adapter).digests().values()
        options["adapter"] = " ".join([str(where.adapter), *(each[:16] for each in digests)])
    given = {name: value for name, value in options.items() if value is not None}
    if sampling is not None:
        plain = SamplingParams(max_new_tokens=sampling.max_new_tokens)
        usual = vars(plain)
        given |= {name: value for name, value in vars(sampling).items() if value != usual[name]}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())


@contextmanager
def at_work(
    folder: ReportFolder | None, keys: tuple[str, ...], total: int
) -> Iterator[tuple[Ledger, ProgressBar]]:
    """The ledger and the bar. After Ctrl-C the ledger's path is named."""
    from minigpt4_runtime.report.ledger import Ledger

    path = folder.file(".jsonl") if folder else None
    try:
        ledger = Ledger(path, keys=keys)
        with progress_bar(total) as bar:
            yield ledger, bar
    except KeyboardInterrupt:
        if path and path.exists():
            note(f"What was judged is in {path}; the same command goes on from there.")
        raise


def check_prompt(prompt: str) -> None:
    """Raise a ConfigError unless it says where the question stands."""
    if "{question}" not in prompt:
        raise ConfigError(f"--prompt is {prompt!r}, without {{question}}. Say where it stands.")


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How questions about pictures are put to a model."""

    images_dir: Path
    prompt: str
    sampling: SamplingParams
    where: ModelOptions

    def ask(
        self,
        questions: Sequence[Q],
        folder: ReportFolder | None,
        right: Callable[[Q], dict[str, Any]],
        put: Callable[..., tuple[dict[int | str, str], tuple[str, ...]]] | None = None,
    ) -> tuple[dict[int | str, str], tuple[str, ...]]:
        """Answers by the questions' ids, and sentences about what could not be asked.

        `put` asks in the stead of `asking.ask`.
        """
        from minigpt4_runtime.evaluation import asking

        model = self.where.load()
        with at_work(folder, asking.LEDGER_KEYS, len(questions)) as (ledger, bar):
            return (put or asking.ask)(
                model, questions, images_dir=self.images_dir, prompt=self.prompt,
                sampling=self.sampling, ledger=ledger,
                asked_of=name_model(self.where, model, self.sampling), right=right,
                on_question=bar.advance,
            )  # fmt: skip

    def answers(
        self,
        questions: Sequence[Q],
        results: Path | None,
        folder: ReportFolder | None,
        right: Callable[[Q], dict[str, Any]],
    ) -> tuple[dict[int | str, str], tuple[str, ...]]:
        """The same, or the answers in the file `results` and what has no counterpart there."""
        if results is None:
            return self.ask(questions, folder, right)
        from minigpt4_runtime.evaluation.asking import name_strays, read_answers

        given = read_answers(results, questions)
        return given, name_strays(results, given, questions)


def show(report: Report, folder: ReportFolder | None, left_out: tuple[str, ...] = ()) -> None:
    """Print a report, write it, and name what was left out: the exit status is then 1."""
    for sentence in left_out:
        report_error(sentence)
    show_report(report, folder)
    if left_out:
        raise typer.Exit(1)


def leave_out(faults: tuple[str, ...]) -> None:
    """Name what could not be asked, where there is no report: the exit status is then 1."""
    for sentence in faults:
        report_error(sentence)
    if faults:
        raise typer.Exit(1)
