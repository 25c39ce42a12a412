"""MME's files are read as published, and the numbers are those of its own script."""

import pytest

from minigpt4_runtime import ConfigError
from minigpt4_runtime.evaluation.mme import MmeQuestion, read_answer, read_answers, read_questions
from minigpt4_runtime.evaluation.mme_report import judge

# In the published layout, with answers as the fourth column. Of "existence" one picture is right
# whole and one in half; an answer that says neither is wrong.
FILES = {
    "existence.txt": [
        ("1.png", "Is there a dog?", "Yes", "Yes, there is."),
        ("1.png", "Is there a cat?", "No", "no"),
        ("2.png", "Is there a dog?", "Yes", "A dog"),
        ("2.png", "Is there a cat?", "No", "There is no cat. No."),
        ("3.png", "Is there a dog?", "Yes", "Yes"),
        ("3.png", "Is there a cat?", "No", "Yes"),
    ],
    "OCR.txt": [("1.png", "Is it A?", "Yes", "yes"), ("1.png", "Is it B?", "No", "No.")],
    "code_reasoning.txt": [("4.png", "Is it 1?", "Yes", "No"), ("4.png", "Is it 2?", "No", "Yes")],
}


@pytest.fixture
def write(tmp_path):
    def write_folder(name, files, num_columns):
        folder = tmp_path / name
        folder.mkdir()
        for file, lines in files.items():
            rows = ("\t".join(line[:num_columns]) + "\n" for line in lines)
            (folder / file).write_text("".join(rows))
        return folder

    return write_folder


@pytest.mark.parametrize(
    ("answer", "read_as"),
    [
        ("Yes", "yes"), ("yes.", "yes"), ("No, it is not", "no"), ("Now yes", "no"),
        ("A: yes", "other"), ("The answer is no", "other"), ("", "other"), (" yes", "yes"),
    ],
)  # fmt: skip
def test_an_answer_is_read_by_its_first_four_characters(answer, read_as):
    assert read_answer(answer) == read_as


def test_the_numbers_by_hand(write, images):
    (images / "OCR").mkdir()
    (images / "1.png").rename(images / "OCR" / "1.png")
    questions = read_questions(write("asked", FILES, 3), images)
    by_id = {each.question_id: each for each in questions}
    assert by_id["OCR/1.png#2"] == MmeQuestion("OCR/1.png#2", "OCR", "OCR/1.png", "Is it B?", "no")
    assert by_id["existence/2.png#1"].image == "2.png"
    answers = read_answers(write("given", FILES, 4), questions)
    report = judge(questions, answers, images_dir=images)
    # "There is no cat" begins with "Ther": it is read as neither.
    existence = {"accuracy": 3 / 6, "accuracy_plus": 1 / 3, "num_other": 2, "num_pictures": 3}
    whole = report.as_mapping()
    assert whole["tasks"]["existence"] == {**existence, "score": pytest.approx(250 / 3)}
    assert whole["tasks"]["OCR"]["score"] == 200
    assert whole["tasks"]["code_reasoning"]["score"] == 0
    assert report.sums == {"perception": pytest.approx(850 / 3), "cognition": 0}
    assert list(report.tasks) == ["existence", "OCR", "code_reasoning"]
    assert "Wrong answers (5 of 5)" in report.as_page()
    assert len(report.as_rows().rows) == 10
    # A picture with one answer is left out as a whole.
    del answers["existence/1.png#2"]
    some = judge(questions, answers, images_dir=images)
    assert (some.tasks["existence"].num_pictures, some.num_unanswered) == (2, 2)
    with pytest.raises(ConfigError, match="No picture has both answers"):
        judge(questions, {}, images_dir=images)


@pytest.mark.parametrize(
    ("lines", "num_columns", "message"),
    [
        ([("1.png", "?", "Yes")], 3, "1.png has 1 questions, not two"),
        ([("1.png", "?", "Perhaps")], 3, "'Perhaps', neither Yes nor No"),
        ([("1.png", "?")], 2, "Line 1 of .* has 2 columns; 3 are wanted"),
    ],
)
def test_questions_of_another_layout(write, images, lines, num_columns, message):
    with pytest.raises(ConfigError, match=message):
        read_questions(write("asked", {"count.txt": lines}, num_columns), images)


def test_other_folders(write, images):
    with pytest.raises(ConfigError, match=r"has no file such as existence\.txt"):
        read_questions(images, images)
    questions = read_questions(write("asked", FILES, 3), images)
    with pytest.raises(ConfigError, match="3 columns; 4 are wanted"):
        read_answers(write("three", FILES, 3), questions)
    other = {"OCR.txt": [("9.png", "Is it A?", "Yes", "yes")]}
    with pytest.raises(ConfigError, match=r"answers 'Is it A\?' about 9.png, which is not asked"):
        read_answers(write("other", other, 4), questions)
