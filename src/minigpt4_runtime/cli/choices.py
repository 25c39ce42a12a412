"""`minigpt4 evaluate choice`, `mme` and `amber`: given answers, and yes or no.

Owns   nothing. Takes options.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from minigpt4_runtime.cli.judging import (
    Asking,
    ImagesDir,
    OutDir,
    Prompt,
    at_work,
    check_prompt,
    leave_out,
    name_model,
    show,
)
from minigpt4_runtime.cli.options import ModelOptions, option, spread_options
from minigpt4_runtime.cli.recipes import RecipeName, take
from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.report.files import ReportFolder, write_whole


@spread_options
def choice(
    *,
    questions: Annotated[
        Path,
        option(
            "FILE",
            "SEED-Bench.json; records with image, question, choices and answer, a line each or as "
            "a JSON list; or a .csv of ImageNetVC, or a folder of them.",
        ),
    ],
    images: ImagesDir,
    classes: Annotated[
        Path | None,
        option(
            "FILE",
            "ImageNetVC's ImageNet_mapping.txt: in which folder the pictures of a category are. "
            "Without it folders have the categories' names.",
        ),
    ] = None,
    prompt: Prompt = "{question}",
    recipe: RecipeName = None,
    where: ModelOptions,
    out: OutDir = None,
) -> None:
    """Ask questions with given answers: is the right one the likeliest?

    No answer is generated. The one counts as chosen whose tokens are the likeliest on average, as
    SEED-Bench has it; the accuracy by whole answers is shown beside it.
    """
    from minigpt4_runtime.evaluation import choice as choice_judge
    from minigpt4_runtime.evaluation import imagenetvc
    from minigpt4_runtime.evaluation.choice_report import judge
    from minigpt4_runtime.evaluation.images import check_folder
    from minigpt4_runtime.evaluation.recipe import Run

    # Nothing is generated: of a recipe its prompt alone counts.
    run = take(
        recipe, "choice", typed=Run(prompt=prompt, sampling=SamplingParams()),
        usual=Run(prompt="{question}", sampling=SamplingParams()),
    )  # fmt: skip
    check_prompt(run.prompt)
    check_folder(images)
    if imagenetvc.is_layout(questions):
        asked = imagenetvc.read_questions(questions, images, classes)
    elif classes:
        raise ConfigError("--classes is for ImageNetVC's .csv files. Leave it out.")
    else:
        asked = choice_judge.read_questions(questions)
    folder = ReportFolder.open(out, "choice")
    model = where.load()
    with at_work(folder, choice_judge.LEDGER_KEYS, len(asked)) as (ledger, bar):
        found, faults = choice_judge.ask(
            model, asked, images_dir=images, prompt=run.prompt, ledger=ledger,
            asked_of=name_model(where, model), on_question=bar.advance,
        )  # fmt: skip
    report = judge(asked, found, images_dir=images, faults=faults)
    show(replace(report, as_published=run.told), folder, report.left_out)


@spread_options
def mme(
    *,
    questions: Annotated[
        Path,
        option(
            "DIR",
            "A file for each task, such as existence.txt, with picture, question and Yes or No in "
            "each line, divided by tabs.",
        ),
    ],
    images: ImagesDir,
    results: Annotated[
        Path | None,
        option(
            "DIR",
            "Score these answers instead of asking: the same files with the model's answer as a "
            "fourth column, as the published script takes them.",
        ),
    ] = None,
    prompt: Prompt = "{question}",
    max_new_tokens: Annotated[int, option("COUNT", "The longest answer, in tokens.")] = 20,
    recipe: RecipeName = None,
    where: ModelOptions,
    out: OutDir = None,
) -> None:
    """Ask two questions about each picture: are both answered right?

    The published scores of MME: accuracy counts questions, accuracy+ pictures; their sum in percent
    is a task's score, and those of its tasks make perception and cognition.
    """
    from minigpt4_runtime.evaluation import mme as mme_judge
    from minigpt4_runtime.evaluation.asking import name_strays
    from minigpt4_runtime.evaluation.images import check_folder
    from minigpt4_runtime.evaluation.mme_report import judge
    from minigpt4_runtime.evaluation.recipe import Run

    run = take(
        recipe, "mme",
        typed=Run(prompt=prompt, sampling=SamplingParams(max_new_tokens=max_new_tokens)),
        usual=Run(prompt="{question}", sampling=SamplingParams(max_new_tokens=20)),
    )  # fmt: skip
    check_prompt(run.prompt)
    check_folder(images)
    asked = mme_judge.read_questions(questions, images)
    folder = ReportFolder.open(out, "mme")
    if results is not None:
        given = mme_judge.read_answers(results, asked)
        faults = name_strays(results, given, asked)
    else:
        asking = Asking(images_dir=images, prompt=run.prompt, sampling=run.sampling, where=where)
        given, faults = asking.ask(asked, folder, lambda question: {"label": question.label})
    given = {question_id: run.trim(answer) for question_id, answer in given.items()}
    report = judge(asked, given, images_dir=images, faults=faults)
    show(replace(report, as_published=run.told), folder, report.left_out)


@spread_options
def amber(
    *,
    questions: Annotated[
        Path,
        option("FILE", "AMBER's query_all.json, or one of its parts, such as query_generative."),
    ],
    images: ImagesDir,
    annotations: Annotated[
        Path | None,
        option("FILE", "AMBER's annotations.json: score the yes-or-no questions here."),
    ] = None,
    save: Annotated[
        Path | None,
        option("FILE", "Write the answers into this file, as AMBER's script reads them."),
    ] = None,
    prompt: Prompt = "{question}",
    max_new_tokens: Annotated[int, option("COUNT", "The longest answer, in tokens.")] = 300,
    where: ModelOptions,
    out: OutDir = None,
) -> None:
    """Ask AMBER's queries: what is there, and what is not?

    Answers to yes-or-no questions become Yes or No by the first such word. Their accuracy,
    precision, recall and F1 are given, where No is the positive label. Descriptions are collected
    for AMBER's own script, which has the lists of words that judge them.
    """
    from minigpt4_runtime.evaluation import amber as amber_judge
    from minigpt4_runtime.evaluation.images import check_folder

    if annotations is None and save is None:
        raise ConfigError("Give --save to collect answers, --annotations to score them, or both.")
    check_prompt(prompt)
    check_folder(images)
    asked = amber_judge.read_questions(questions)
    folder = ReportFolder.open(out, "amber")
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    asking = Asking(images_dir=images, prompt=prompt, sampling=sampling, where=where)
    given, faults = asking.ask(asked, folder, lambda _: {})
    if save is not None:
        responses = amber_judge.as_responses(asked, given)
        write_whole(save, json.dumps(responses, ensure_ascii=False, indent=1) + "\n")
    if annotations is None:
        leave_out(faults)
        return
    report = amber_judge.judge(asked, given, annotations, images_dir=images, faults=faults)
    show(report, folder, report.left_out)
