"""OPOPE: POPE's questions, answered by what captions name.

By Chen et al., "HALC: Object Hallucination Reduction via Adaptive Focal-Contrast Decoding",
arXiv:2403.00425.

Owns   the reading of a question's object, and the number that is added to POPE's.
Takes  POPE's questions, captions and the words for objects; gives an OpopeReport.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.evaluation.answers import name_some
from minigpt4_runtime.evaluation.asking import Id, pair
from minigpt4_runtime.evaluation.chair import Caption, ObjectWords, coco_id
from minigpt4_runtime.evaluation.pope import PopeQuestion
from minigpt4_runtime.evaluation.pope_report import PopeReport, PopeVerdict

# Precision counts more than recall: a caption need not name all that is there.
BETA = 0.2


@dataclass(frozen=True)
class OpopeReport(PopeReport):
    """POPE's numbers over questions that captions answer, and F0.2."""

    @property
    def rates(self) -> dict[str, float | None]:
        """POPE's five, and F with a beta of 0.2; None where a divisor is 0."""
        rates = super().rates
        precision, recall = rates["precision"], rates["recall"]
        f_beta = None
        if precision and recall:
            f_beta = (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)
        return {**rates, "f0.2": f_beta}

    @property
    def explanation(self) -> str:
        """What a reader of the page must know."""
        return (
            "OPOPE lets captions answer POPE's questions: yes if the caption names the thing, "
            "else no. Recall is low where captions are short; F0.2 counts precision more."
        )


def judge(
    questions: Sequence[PopeQuestion],
    captions: Sequence[Caption],
    words: ObjectWords,
    *,
    images_dir: Path | None = None,
) -> OpopeReport:
    """Answer the questions about the captions' pictures; those about others are not asked.

    Raises:
        ConfigError: a question is about no object of the list, or no caption is asked about.
    """
    text_of = {caption.image_id: caption.text for caption in captions}
    named = {number: {m.object for m in words.find(text)} for number, text in text_of.items()}
    answers: dict[Id, str] = {}
    asked = []
    for question in questions:
        number = coco_id(question.image)
        if number in named:
            said = "Yes" if _object_of(question, words) in named[number] else "No"
            answers[question.question_id] = f"{said}. {text_of[number]}"
            asked.append(question)
    about = {coco_id(question.image) for question in questions}
    strays = [number for number in text_of if number not in about]
    left_out = (f"No question is about {name_some(strays)}.",) if strays else ()
    verdicts = tuple(starmap(PopeVerdict, pair(asked, answers, left_out)))
    return OpopeReport(verdicts, 0, left_out, images_dir)


def _object_of(question: PopeQuestion, words: ObjectWords) -> str:
    """The object that a question is about, such as "traffic light"."""
    asked = re.fullmatch(r"Is there an? (.+) in the image\??", question.text.strip(), re.IGNORECASE)
    found = words.object_of(asked[1].lower()) if asked else None
    if found is None:
        raise ConfigError(
            f"Question {question.question_id}, {question.text!r}, is not about an object of the "
            "list. OPOPE takes questions such as 'Is there a dog in the image?'."
        )
    return found
