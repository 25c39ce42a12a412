"""`minigpt4 evaluate`: the quality of answers, judged in four ways."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from minigpt4_runtime.cli.options import ModelOptions, option, spread_options
from minigpt4_runtime.cli.terminal import ProgressBar, note, progress_bar, show_report
from minigpt4_runtime.cli.terminal import report as report_error
from minigpt4_runtime.config import EngineConfig, SamplingParams
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.report.files import ReportFolder
from minigpt4_runtime.text.prompt import DESCRIBE_PROMPT

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4
    from minigpt4_runtime.evaluation.divergence import Divergence
    from minigpt4_runtime.evaluation.judge import Judge
    from minigpt4_runtime.report.files import Report
    from minigpt4_runtime.report.ledger import Ledger

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

evaluate = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@evaluate.callback()
def evaluate_group() -> None:
    """Judge answers: by CLIP, beside others, by POPE, by scenes.

    Numbers go to stdout. What cannot be judged is named and left out; the exit status is then 1.
    """


@evaluate.command()
def clip(
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE", help="Further files of results.")
    ] = None,
    *,
    results: Annotated[
        list[Path],
        option(
            "FILE",
            "What `describe --out` wrote, or a .json with several runs: "
            '{picture: {"GPU": answer, "NPU": answer}}. The others are compared with the first.',
        ),
    ],
    images: ImagesDir,
    judge: Annotated[
        Path,
        option(
            "DIR",
            "A CLIP model: a folder in Hugging Face layout, or with (or the path of) "
            "open_clip_pytorch_model.bin.",
        ),
    ],
    sample: Annotated[
        int | None,
        option("COUNT", "Judge only so many pictures, drawn by lot.", min=1),
    ] = None,
    seed: Annotated[int, option("NUMBER", "Draws the same pictures everywhere.")] = 0,
    device: JudgeDevice = "auto",
    out: OutDir = None,
) -> None:
    """Score answers against their pictures by a CLIP model.

    The score is the cosine of the two, and higher is better. Only pictures that every run has
    answered are judged.
    """
    from minigpt4_runtime.evaluation import answers
    from minigpt4_runtime.evaluation import clip as clip_judge

    those = answers.line_up(answers.read_runs([*results, *(more or [])]), images)
    if sample is not None:
        if sample > len(those.cases):
            note(f"--sample is {sample}, and there are {len(those.cases)} pictures: all are taken.")
        those = answers.sampled(those, sample, seed=seed)
    folder = ReportFolder.open(out, "clip")
    loaded = _load_judge(judge, device)
    with _at_work(folder, clip_judge.LEDGER_KEYS, len(those.cases)) as (ledger, bar):
        report = clip_judge.score(those, loaded, ledger, images_dir=images, on_image=bar.advance)
    _show(report, folder, report.left_out)


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """The two models whose answers are compared, for the KL divergence."""

    reference_model: Annotated[
        Path | None,
        option(
            "DIR",
            "The model of the reference's answers, as a folder or a name. With --candidate-model "
            "and --images, the KL divergence is given too.",
        ),
    ] = None
    candidate_model: Annotated[Path | None, option("DIR", "The candidate's model.")] = None
    reference_dtype: Annotated[
        str, option("DTYPE", "auto, float32, float16 or bfloat16: what that model computes in.")
    ] = "auto"
    candidate_dtype: Annotated[str, option("DTYPE", "The same of the candidate's.")] = "auto"
    reference_cache_dtype: Annotated[
        str,
        option(
            "DTYPE",
            "auto, float32, float16, bfloat16, int8, int4 or fp8: how that model keeps keys and "
            "values.",
        ),
    ] = "auto"
    candidate_cache_dtype: Annotated[str, option("DTYPE", "The same of the candidate's.")] = "auto"
    prompt: Annotated[str, option("TEXT", "What was asked about each picture.")] = DESCRIBE_PROMPT

    def load(self, images: Path | None, device: str) -> Divergence | None:
        """Load both; None without these options.

        Raises:
            ConfigError: one of them or the folder of pictures is missing.
        """
        if self == PairOptions():
            return None
        if self.reference_model is None or self.candidate_model is None or images is None:
            raise ConfigError(
                "KL needs --reference-model, --candidate-model and --images. Give all three."
            )
        from minigpt4_runtime.api import MiniGPT4
        from minigpt4_runtime.evaluation.divergence import Divergence

        note("Loading both models …")
        reference, candidate = (
            # `load` itself refuses a dtype that it does not know.
            MiniGPT4.load(
                model, device=device, dtype=cast(Any, dtype),
                # No answer is generated.
                engine=EngineConfig(num_blocks=1, cache_dtype=cast(Any, cache_dtype)),
            )
            for model, dtype, cache_dtype in (
                (self.reference_model, self.reference_dtype, self.reference_cache_dtype),
                (self.candidate_model, self.candidate_dtype, self.candidate_cache_dtype),
            )
        )  # fmt: skip
        return Divergence(reference, candidate, images_dir=images, prompt=self.prompt)


@evaluate.command()
@spread_options
def parity(
    *,
    reference: Annotated[
        Path,
        option("FILE", "What `describe --out` wrote before."),
    ],
    candidate: Annotated[Path, option("FILE", "What it wrote after a change.")],
    images: Annotated[
        Path | None,
        option("DIR", "The folder with the pictures: shown in the page, and to the models."),
    ] = None,
    judge: Annotated[
        Path | None,
        option("DIR", "A CLIP model: compare the texts' embeddings too."),
    ] = None,
    models: PairOptions,
    device: Annotated[
        str, option("DEVICE", "Where the judge and the models run: auto, cpu, cuda, …")
    ] = "auto",
    out: OutDir = None,
) -> None:
    """Tell whether a change has altered answers, where and how much.

    A change is another way to run the same model. Where answers part is counted in tokens if both
    files are .jsonl with token_ids, else in words. With both models, each is fed the reference's
    answers, and the KL divergence says how far the candidate's expectations of the next token lie
    from the reference's: in nats, the mean over an answer's tokens and over pictures.
    """
    from minigpt4_runtime.evaluation import answers
    from minigpt4_runtime.evaluation import parity as parity_judge
    from minigpt4_runtime.evaluation.images import check_folder

    runs = answers.read_runs([reference, candidate])
    if len(runs) != 2:
        names = ", ".join(run.name for run in runs)
        raise ConfigError(f"The two files hold {len(runs)} runs ({names}). Give one in each.")
    if images is not None:
        check_folder(images)
    those = answers.line_up_by_name(runs)
    folder = ReportFolder.open(out, "parity")
    loaded = _load_judge(judge, device) if judge else None
    divergence = models.load(images, device)
    with _at_work(folder, parity_judge.LEDGER_KEYS, len(those.cases)) as (ledger, bar):
        report = parity_judge.compare(
            those, judge=loaded, ledger=ledger, divergence=divergence, images_dir=images,
            on_pair=bar.advance,
        )  # fmt: skip
    _show(report, folder, report.left_out)


@evaluate.command()
@spread_options
def pope(
    *,
    questions: Annotated[
        Path,
        option(
            "FILE", "One JSON object a line with question_id, image, text and label, as published."
        ),
    ],
    images: ImagesDir,
    results: Annotated[
        Path | None,
        option(
            "FILE",
            "Score these answers instead of asking: one a line with question_id and answer, "
            "or question and answer in the questions' order.",
        ),
    ] = None,
    prompt: Annotated[
        str,
        option("TEXT", "How to ask; {question} stands for the question."),
    ] = "{question}",
    max_new_tokens: Annotated[
        int,
        option("COUNT", "The longest answer, in tokens. Only its first sentence counts."),
    ] = 40,
    where: ModelOptions,
    out: OutDir = None,
) -> None:
    """Ask what is in pictures: how often is a thing seen that is not?

    The published test of object hallucination by yes-or-no questions, with its rule: an answer is
    no if its first sentence has the word No, no or not, and yes otherwise.
    """
    from minigpt4_runtime.evaluation import pope as pope_judge
    from minigpt4_runtime.evaluation.images import check_folder
    from minigpt4_runtime.evaluation.pope_report import judge

    if "{question}" not in prompt:
        raise ConfigError(f"--prompt is {prompt!r}, without {{question}}. Say where it stands.")
    check_folder(images)
    asked = pope_judge.read_questions(questions)
    folder = ReportFolder.open(out, "pope")
    if results is not None:
        given = pope_judge.read_answers(results, asked)
        faults = pope_judge.name_strays(results, given, asked)
    else:
        model = where.load()
        with _at_work(folder, pope_judge.LEDGER_KEYS, len(asked)) as (ledger, bar):
            given, faults = pope_judge.ask(
                model, asked, images_dir=images, prompt=prompt,
                sampling=SamplingParams(max_new_tokens=max_new_tokens), ledger=ledger,
                asked_of=_name_model(where, model), on_question=bar.advance,
            )  # fmt: skip
    report = judge(asked, given, images_dir=images, faults=faults)
    _show(report, folder, report.left_out)


@evaluate.command()
@spread_options
def demo(
    *,
    num_scenes: Annotated[
        int, option("COUNT", "How many scenes to draw.", "--scenes", min=1)
    ] = 500,
    seed: Annotated[int, option("NUMBER", "Draws the same scenes everywhere.")] = 0,
    compare: Annotated[
        Path | None,
        option("FILE", "An earlier demo.json: show the change from it."),
    ] = None,
    where: ModelOptions,
    out: OutDir = None,
) -> None:
    """Count the demo model's exact answers, by kind of question.

    The scenes are drawn, and none of them was trained on. With --compare it shows what a dtype, a
    device or another way to run costs in answers.
    """
    from minigpt4_runtime.evaluation import demo_check
    from minigpt4_runtime.evaluation.demo_report import DemoReport, read_earlier

    before = read_earlier(compare, num_scenes=num_scenes, seed=seed) if compare else None
    folder = ReportFolder.open(out, "demo")
    model = where.load(announce_demo=False)
    asked_of = _name_model(where, model)
    with _at_work(folder, demo_check.LEDGER_KEYS, num_scenes) as (ledger, bar):
        checked = demo_check.check(
            model, num_scenes=num_scenes, seed=seed, ledger=ledger, asked_of=asked_of,
            on_scene=bar.advance,
        )  # fmt: skip
    _show(DemoReport(checked, asked_of, before), folder)


def _load_judge(path: Path, device: str) -> Judge:
    note(f"Loading the judge from {path} …")
    from minigpt4_runtime.evaluation.judge import Judge

    return Judge.load(path, device=device)


def _name_model(where: ModelOptions, model: MiniGPT4) -> str:
    """The model in words, with every given option, as each may change answers."""
    options = {**asdict(where), "device": model.device, "dtype": model.dtype}
    options["model"] = where.model or "demo"
    given = {name: value for name, value in options.items() if value is not None}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())


@contextmanager
def _at_work(
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


def _show(report: Report, folder: ReportFolder | None, left_out: tuple[str, ...] = ()) -> None:
    for sentence in left_out:
        report_error(sentence)
    show_report(report, folder)
    if left_out:
        raise typer.Exit(1)
