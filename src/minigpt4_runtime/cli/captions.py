"""`minigpt4 evaluate chair` and `opope`: captions, and what they name that is not there.

Owns   the asking for captions, and their file in the published form.
Takes  options.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from minigpt4_runtime.cli.judging import Asking, OutDir, show
from minigpt4_runtime.cli.options import ModelOptions, flag, option, spread_options
from minigpt4_runtime.cli.recipes import RecipeName, take
from minigpt4_runtime.config import SamplingParams
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.report.files import ReportFolder, write_whole
from minigpt4_runtime.text.prompt import DESCRIBE_PROMPT

if TYPE_CHECKING:
    from minigpt4_runtime.evaluation.chair import Caption
    from minigpt4_runtime.evaluation.recipe import Run


Synonyms = Annotated[
    Path,
    option(
        "FILE",
        "The published list of objects and their synonyms, which decides the numbers: "
        "data/synonyms.txt of github.com/LisaAnne/Hallucination.",
    ),
]


@dataclass(frozen=True)
class Picture:
    """A picture to be described: a `Question` whose words are the prompt's alone."""

    question_id: int
    image: str
    text: str = ""


@spread_options
def chair(
    *,
    instances: Annotated[
        list[Path], option("FILE", "COCO's segments: instances_val2014.json. Several may be given.")
    ],
    captions: Annotated[
        list[Path],
        option("FILE", "COCO's captions: captions_val2014.json. Several may be given."),
    ],
    synonyms: Synonyms,
    images: Annotated[
        Path | None,
        option("DIR", "The folder with COCO's pictures, to be described and shown in the page."),
    ] = None,
    results: Annotated[
        Path | None,
        option(
            "FILE",
            "Score these captions instead of asking: image_id and caption, a line each or as a "
            "JSON list, or what `describe --out` wrote.",
        ),
    ] = None,
    ids: Annotated[
        Path | None, option("FILE", "Take only the pictures that this file has captions of.")
    ] = None,
    drop_unfinished: Annotated[
        bool, flag("Leave out what follows a caption's last full stop.", "--drop-unfinished")
    ] = False,
    save: Annotated[
        Path | None, option("FILE", "Write image_id and caption into this file, a line each.")
    ] = None,
    prompt: Annotated[
        str,
        option(
            "TEXT", "What is asked about each picture; with <ImageHere> for it, taken as it is."
        ),
    ] = DESCRIBE_PROMPT,
    max_new_tokens: Annotated[int, option("COUNT", "The longest caption, in tokens.")] = 512,
    recipe: RecipeName = None,
    where: ModelOptions,
    out: OutDir = None,
) -> None:
    """Describe pictures: how often is a thing named that is not there?

    CHAIRs counts captions with such a thing, CHAIRi mentions; recall counts the things that are
    there and named. COCO's segments and people's captions say what is there.
    """
    from minigpt4_runtime.evaluation import chair as chair_judge
    from minigpt4_runtime.evaluation.chair_report import judge
    from minigpt4_runtime.evaluation.images import check_folder
    from minigpt4_runtime.evaluation.recipe import Run

    if results is None and images is None:
        raise ConfigError("Give captions with --results, or pictures to describe with --images.")
    run = take(
        recipe, "captions",
        typed=Run(prompt=prompt, sampling=SamplingParams(max_new_tokens=max_new_tokens)),
        usual=Run(prompt=DESCRIBE_PROMPT, sampling=SamplingParams(max_new_tokens=512)),
    )  # fmt: skip
    if images is not None:
        check_folder(images)
    words = chair_judge.ObjectWords.read(synonyms)
    wanted = {each.image_id for each in chair_judge.read_captions(ids)} if ids else None
    folder = ReportFolder.open(out, "chair")
    faults: tuple[str, ...] = ()
    if results is not None:
        given = [
            each
            for each in chair_judge.read_captions(results)
            if wanted is None or each.image_id in wanted
        ]
    else:
        assert images is not None, "checked above"
        asking = Asking(images_dir=images, prompt=run.prompt, sampling=run.sampling, where=where)
        pictures = choose_pictures(images, wanted, run, captions)
        given, faults = describe_all(asking, pictures, folder)
    given = [replace(each, text=run.trim(each.text)) for each in given]
    if drop_unfinished:
        given = [replace(each, text=chair_judge.finished_part(each.text)) for each in given]
    if save is not None:
        save_captions(save, given)
    objects = chair_judge.read_objects(
        instances, captions, words, {each.image_id for each in given}
    )
    report = judge(given, objects, words, images_dir=images, faults=faults)
    show(replace(report, as_published=run.told), folder, report.left_out)


def save_captions(path: Path, captions: list[Caption]) -> None:
    """Write captions as `chair` and `opope` read them, a line each."""
    records = ({"image_id": each.image_id, "caption": each.text} for each in captions)
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    write_whole(path, "".join(f"{line}\n" for line in lines))


def opope(
    *,
    questions: Annotated[Path, option("FILE", "POPE's questions, as `evaluate pope` takes them.")],
    results: Annotated[
        Path,
        option(
            "FILE",
            "Captions: image_id and caption, a line each or as a JSON list, or what `describe "
            "--out` or `evaluate chair --save` wrote.",
        ),
    ],
    synonyms: Synonyms,
    images: Annotated[
        Path | None, option("DIR", "The folder with COCO's pictures, shown in the page.")
    ] = None,
    out: OutDir = None,
) -> None:
    """Let captions answer POPE's questions: yes if they name the thing.

    Questions about pictures without a caption are not asked. Beside POPE's numbers it gives F0.2,
    in which precision counts more than recall, since a caption need not name all that is there.
    """
    from minigpt4_runtime.evaluation import chair as chair_judge
    from minigpt4_runtime.evaluation.images import check_folder
    from minigpt4_runtime.evaluation.opope import judge
    from minigpt4_runtime.evaluation.pope import read_questions

    if images is not None:
        check_folder(images)
    words = chair_judge.ObjectWords.read(synonyms)
    folder = ReportFolder.open(out, "opope")
    captions = chair_judge.read_captions(results)
    report = judge(read_questions(questions), captions, words, images_dir=images)
    show(report, folder, report.left_out)


def choose_pictures(
    images_dir: Path, wanted: set[int] | None, run: Run, captions: Sequence[Path]
) -> list[Picture]:
    """The folder's pictures with a wanted number; without wanted ones, those the recipe chooses."""
    from minigpt4_runtime.evaluation.chair import read_image_order

    if wanted is not None or run.pictures is None:
        return find_pictures(images_dir, wanted, None)
    order = read_image_order(captions) if run.pictures.order == "annotations" else None
    return run.pictures.choose(find_pictures(images_dir, None, order))


def find_pictures(
    images_dir: Path, wanted: set[int] | None, order: list[int] | None
) -> list[Picture]:
    """The folder's pictures of COCO, or those with a wanted number.

    They are in the order of their names, or of the numbers in `order`, which leaves others out.

    Raises:
        ConfigError: there is no such picture.
    """
    from minigpt4_runtime.evaluation.chair import coco_id
    from minigpt4_runtime.images.formats import IMAGE_SUFFIXES

    pictures = {}
    for path in sorted(images_dir.iterdir()):
        number = coco_id(path.name) if path.suffix.lower() in IMAGE_SUFFIXES else None
        if number is not None and (wanted is None or number in wanted):
            pictures[number] = Picture(number, path.name)
    if order is not None:
        pictures = {number: pictures[number] for number in order if number in pictures}
    if not pictures:
        raise ConfigError(
            f"{images_dir} has no picture with a wanted number in its name, such as "
            "COCO_val2014_000000016631.jpg."
        )
    return list(pictures.values())


def describe_all(
    asking: Asking, pictures: list[Picture], folder: ReportFolder | None
) -> tuple[list[Caption], tuple[str, ...]]:
    """Captions of the pictures, and what failed."""
    from minigpt4_runtime.evaluation.chair import Caption

    answers, faults = asking.ask(pictures, folder, lambda _: {})
    captions = [
        Caption(each.question_id, answers[each.question_id], each.image)
        for each in pictures
        if each.question_id in answers
    ]
    return captions, faults
