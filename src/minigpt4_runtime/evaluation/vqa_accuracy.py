"""The accuracy of VQA: how many of ten people gave an answer, after spelling is made equal.

Antol et al., "VQA: Visual Question Answering", arXiv:1505.00468, and visualqa.org/evaluation.

Owns   the rules by which two spellings are one answer, and the accuracy.
Takes  texts.
"""

import re
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""
# Each with one of its apostrophes left out.
_SPELT = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTIONS.split()
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # As in the published table, where it stands the other way round.


def normalise(answer: str) -> str:
    """An answer in the spelling in which answers are compared.

    In lower case; numbers up to ten as digits; without articles, periods (but not those of
    decimals) and other punctuation, except apostrophes and colons; missing apostrophes put in.
    Example: "The two dogs, I dont know." → "2 dogs i don't know".
    """
    return _without_articles(_without_punctuation(answer))


def _without_punctuation(text: str) -> str:
    # A mark beside a space only goes; one between letters leaves a space. With a comma between
    # digits all marks only go.
    has_large_number = re.search(r"\d,\d", text)
    cleared = text
    for mark in _PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        cleared = cleared.replace(mark, "" if is_beside_space or has_large_number else " ")
    return re.sub(r"\.(?!\d)", "", cleared)


def _without_articles(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_SPELT.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, right: Sequence[str]) -> float:
    """How right an answer is, from 0 to 1, by the answers of ten people.

    It is right if three people gave it. Each of them is left out once, and the mean is taken. As in
    the published code, spelling counts where all agree.
    """
    given = _plain(answer)
    people = [_plain(each) for each in right]
    if len(set(people)) > 1:
        given, people = normalise(given), [normalise(each) for each in people]
    same = people.count(given)
    others = (same - (each == given) for each in people)
    return sum(min(1.0, count / 3) for count in others) / len(people)


def exact_accuracy(answer: str, right: str) -> float:
    """1 if it is the one right answer, in any case, else 0."""
    return float(_plain(answer).lower() == _plain(right).lower())


def _plain(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
