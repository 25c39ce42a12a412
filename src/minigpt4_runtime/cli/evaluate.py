"""`minigpt4 evaluate`: the quality of answers, judged in ten ways."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from minigpt4_runtime.cli.captions import chair, opope
from minigpt4_runtime.cli.choices import amber, choice, mme
from minigpt4_runtime.cli.judging import (
    Asking,
    ImagesDir,
    JudgeDevice,
    OutDir,
    Prompt,
    at_work,
    check_prompt,
    load_judge,
    name_model,
    show,
)
from minigpt4_runtime.cli.options import ModelOptions, flag, option, spread_options
from minigpt4_runtime.cli.recipes import RecipeName, take
from minigpt4_runtime.cli.terminal import note
from minigpt4_runtime.config import EngineConfig, SamplingParams
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.report.files import ReportFolder
from minigpt4_runtime.text.prompt import DESCRIBE_PROMPT

if TYPE_CHECKING:
    from minigpt4_runtime.evaluation.divergence import Divergence

# As MiniGPT-v2 was taught, and asked by its own evaluation.
REFER_PROMPT = "[refer] give me the location of {question}"
VQA_PROMPT = "[vqa] Based on the image, respond to this question with a short answer: {question}"

evaluate = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@evaluate.callback()
def evaluate_group() -> None:
    """Judge answers: by CLIP, beside others, by published tests.

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
    loaded = load_judge(judge, device)
    with at_work(folder, clip_judge.LEDGER_KEYS, len(those.cases)) as (ledger, bar):
        report = clip_judge.score(those, loaded, ledger, images_dir=images, on_image=bar.advance)
    show(report, folder, report.left_out)


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
    loaded = load_judge(judge, device) if judge else None
    divergence = models.load(images, device)
    with at_work(folder, parity_judge.LEDGER_KEYS, len(those.cases)) as (ledger, bar):
        report = parity_judge.compare(
            those, judge=loaded, ledger=ledger, divergence=divergence, images_dir=images,
            on_pair=bar.advance,
        )  # fmt: skip
    show(report, folder, report.left_out)


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
    prompt: Prompt = "{question}",
    max_new_tokens: Annotated[
        int,
        option("COUNT", "The longest answer, in tokens."),
    ] = 40,
    reading: Annotated[
        str,
        option(
            "NAME",
            "What makes an answer a no: no or not as a word of its first-sentence (POPE), no, not "
            "or n't in all-words (OPERA, PAI), no, false or n't as a substring, so that snow is a "
            "no (Nullu).",
        ),
    ] = "first-sentence",
    recipe: RecipeName = None,
    dialogue: Annotated[
        bool,
        flag(
            "Ask the questions of a multi-turn file (chat_id, and lists in text and label) in one "
            "dialogue for each picture. Without it each is asked alone.",
            "--dialogue",
        ),
    ] = False,
    where: ModelOptions,
    out: OutDir = None,
) -> None:
    """Ask what is in pictures: how often is a thing seen that is not?

    The published test of object hallucination by yes-or-no questions. Papers read answers
    differently; --reading says how, and is POPE's own without it.
    """
    from minigpt4_runtime.evaluation import pope as pope_judge
    from minigpt4_runtime.evaluation.asking import name_strays
    from minigpt4_runtime.evaluation.images import check_folder
    from minigpt4_runtime.evaluation.pope_report import judge
    from minigpt4_runtime.evaluation.recipe import Run

    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    run = take(
        recipe, "pope", typed=Run(prompt=prompt, sampling=sampling, reading=reading),
        usual=Run(prompt="{question}", sampling=SamplingParams(max_new_tokens=40)),
    )  # fmt: skip
    check_prompt(run.prompt)
    check_folder(images)
    asked = pope_judge.read_questions(questions)
    if dialogue and all(question.chat is None for question in asked):
        raise ConfigError(f"{questions} has no dialogues (chat_id). Leave --dialogue out.")
    folder = ReportFolder.open(out, "pope")
    if results is not None:
        given = pope_judge.read_answers(results, asked)
        faults = name_strays(results, given, asked)
    else:
        asking = Asking(images_dir=images, prompt=run.prompt, sampling=run.sampling, where=where)
        put = pope_judge.ask_in_dialogues if dialogue else None
        if put is not None and run.is_raw:
            if run.prompt_later is None:
                raise ConfigError(
                    "--dialogue with a raw prompt needs a recipe's prompt_later: how the questions "
                    "after the first are put."
                )
            put = partial(put, prompt_later=run.prompt_later)
        given, faults = asking.ask(asked, folder, lambda question: {"label": question.label}, put)
    given = {question_id: run.trim(answer) for question_id, answer in given.items()}
    report = judge(asked, given, images_dir=images, faults=faults, reading=run.reading)
    show(replace(report, as_published=run.told), folder, report.left_out)


Results = Annotated[
    Path | None,
    option(
        "FILE",
        "Score these answers instead of asking: records with question_id and answer, a line "
        "each or as a JSON list, or a JSON object from ids to answers.",
    ),
]


@evaluate.command()
@spread_options
def refer(
    *,
    questions: Annotated[
        Path,
        option(
            "FILE",
            "A JSON list of phrases with img_id, sents, bbox, width and height, as MiniGPT-v2's "
            "files for RefCOCO, RefCOCO+ and RefCOCOg have them.",
        ),
    ],
    images: ImagesDir,
    results: Results = None,
    prompt: Prompt = REFER_PROMPT,
    max_new_tokens: Annotated[int, option("COUNT", "The longest answer, in tokens.")] = 40,
    where: ModelOptions,
    out: OutDir = None,
) -> None:
    """Ask where things are: how often is the right one found?

    For models that answer with boxes. A thing is found if the overlap (IoU) of the box at the
    answer's beginning and the right one is above 0.5, computed as MiniGPT-v2's evaluation does it.
    """
    from minigpt4_runtime.evaluation.images import check_folder
    from minigpt4_runtime.evaluation.refer import read_questions
    from minigpt4_runtime.evaluation.refer_report import judge

    check_prompt(prompt)
    check_folder(images)
    asked = read_questions(questions)
    folder = ReportFolder.open(out, "refer")
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    asking = Asking(images_dir=images, prompt=prompt, sampling=sampling, where=where)
    given, faults = asking.answers(
        asked, results, folder, lambda question: {"right": question.right}
    )
    report = judge(asked, given, images_dir=images, faults=faults)
    show(report, folder, report.left_out)


@evaluate.command()
@spread_options
def vqa(
    *,
    questions: Annotated[
        Path,
        option(
            "FILE",
            "The questions of VQAv2, OK-VQA, GQA, VSR or Hateful Memes, or a JSON list with image, "
            "question and answer or answers.",
        ),
    ],
    annotations: Annotated[
        Path | None, option("FILE", "People's answers to the questions of VQAv2 and OK-VQA.")
    ] = None,
    images: ImagesDir,
    results: Results = None,
    prompt: Prompt = VQA_PROMPT,
    max_new_tokens: Annotated[int, option("COUNT", "The longest answer, in tokens.")] = 20,
    where: ModelOptions,
    out: OutDir = None,
) -> None:
    """Ask about pictures: how often do people say the same?

    With several people's answers it is the accuracy of VQA: right if three gave it, after numbers,
    articles and punctuation are made equal. With one right answer, as in GQA, it must be that one.
    """
    from minigpt4_runtime.evaluation.images import check_folder
    from minigpt4_runtime.evaluation.vqa import read_questions
    from minigpt4_runtime.evaluation.vqa_report import judge

    check_prompt(prompt)
    check_folder(images)
    asked = read_questions(questions, annotations, images_dir=images)
    folder = ReportFolder.open(out, "vqa")
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    asking = Asking(images_dir=images, prompt=prompt, sampling=sampling, where=where)
    given, faults = asking.answers(
        asked, results, folder, lambda question: {"right": question.right}
    )
    report = judge(asked, given, images_dir=images, faults=faults)
    show(report, folder, report.left_out)


evaluate.command()(chair)
evaluate.command()(opope)
evaluate.command()(choice)
evaluate.command()(mme)
evaluate.command()(amber)


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

    The scenes are drawn, and none of them was trained on. A model that writes boxes is asked for
    them, and boxes that overlap the right ones by half are counted too. With --compare it shows
    what a dtype, a device or another way to run costs in answers.
    """
    from minigpt4_runtime.evaluation import demo_check
    from minigpt4_runtime.evaluation.demo_report import DemoReport, read_earlier

    before = read_earlier(compare, num_scenes=num_scenes, seed=seed) if compare else None
    folder = ReportFolder.open(out, "demo")
    model = where.load(announce_demo=False)
    asked_of = name_model(where, model)
    with at_work(folder, demo_check.LEDGER_KEYS, num_scenes) as (ledger, bar):
        checked = demo_check.check(
            model, num_scenes=num_scenes, seed=seed, ledger=ledger, asked_of=asked_of,
            on_scene=bar.advance,
        )  # fmt: skip
    show(DemoReport(checked, asked_of, before), folder)
