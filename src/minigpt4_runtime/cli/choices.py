"""`minigpt4 evaluate choice`: questions with given answers, chosen by their likelihood.

Owns   nothing. Takes options.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from minigpt4_runtime.cli.judging import (
    ImagesDir,
    OutDir,
    Prompt,
    at_work,
    check_prompt,
    name_model,
    show,
)
from minigpt4_runtime.cli.options import ModelOptions, option, spread_options
from minigpt4_runtime.report.files import ReportFolder


@spread_options
def choice(
    *,
    questions: Annotated[
        Path,
        option(
            "FILE",
            "SEED-Bench.json, or records with image, question, choices and answer, a line each or "
            "as a JSON list.",
        ),
    ],
    images: ImagesDir,
    prompt: Prompt = "{question}",
    where: ModelOptions,
    out: OutDir = None,
) -> None:
    """Ask questions with given answers: is the right one the likeliest?

    No answer is generated. The one counts as chosen whose tokens are the likeliest on average, as
    SEED-Bench has it; the accuracy by whole answers is shown beside it.
    """
    from minigpt4_runtime.evaluation import choice as choice_judge
    from minigpt4_runtime.evaluation.choice_report import judge
    from minigpt4_runtime.evaluation.images import check_folder

    check_prompt(prompt)
    check_folder(images)
    asked = choice_judge.read_questions(questions)
    folder = ReportFolder.open(out, "choice")
    model = where.load()
    with at_work(folder, choice_judge.LEDGER_KEYS, len(asked)) as (ledger, bar):
        found, faults = choice_judge.ask(
            model, asked, images_dir=images, prompt=prompt, ledger=ledger,
            asked_of=name_model(where, model), on_question=bar.advance,
        )  # fmt: skip
    report = judge(asked, found, images_dir=images, faults=faults)
    show(report, folder, report.left_out)
