"""Streaming shows what the whole shows; stops are found wherever they fall."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_runtime import SamplingParams
from minigpt4_runtime.text.answer import AnswerText
from minigpt4_runtime.text.prompt import TEMPLATES
from minigpt4_runtime.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(__file__).parents[1] / "goldens/vicuna/checkpoint/llama/tokenizer.model")
VICUNA = TEMPLATES["vicuna"]


def run(ids, stop=None):
    """Feed ids until a stop: the deltas, the answer and how many ids were read."""
    answer, deltas, read = AnswerText(TOKENIZER, VICUNA, SamplingParams(stop=stop)), [], 0
    while read < len(ids) and not answer.stopped:
        deltas.append(answer.feed(ids[read]))
        read += 1
    deltas.append(answer.finish())
    return deltas, answer, read


def original_reply(text: str) -> str:
    """What upstream's Chat.answer makes of decoded text."""
    return text.split("###")[0].split("Assistant:")[-1].strip()


texts = st.text(st.sampled_from("ab# \nAs:é世"), max_size=30)


@settings(max_examples=300)
@given(texts)
def test_reply_is_the_originals(text):
    ids = TOKENIZER.encode(text)
    _, answer, _ = run(ids)
    assert answer.reply == original_reply(TOKENIZER.decode(ids))


@settings(max_examples=300)
@given(texts, st.sampled_from([None, (), ("b",), ("世\n", "ab")]))
def test_deltas_add_up_to_the_reply(text, stop):
    deltas, answer, _ = run(TOKENIZER.encode(text), stop)
    if "Assistant:" not in text:
        assert "".join(deltas) == answer.reply


def test_mark_of_the_assistant_drops_what_stands_before():
    _, answer, _ = run(TOKENIZER.encode("Human: x Assistant: y"))
    assert answer.reply == "y"
    _, answer, _ = run(TOKENIZER.encode("Human: x Assistant: y"), ())
    assert answer.reply == "Human: x Assistant: y"


@pytest.mark.parametrize("text", ["one ### two", "one###two", "one #### two"])
def test_template_stop_ends_at_once(text):
    ids = TOKENIZER.encode(text)
    deltas, answer, count = run(ids)
    assert answer.stopped
    assert "".join(deltas) == answer.reply == "one"
    assert count <= len(ids)
    assert "###" in TOKENIZER.decode(ids[:count])
    assert "###" not in TOKENIZER.decode(ids[: count - 1])


def test_strings_add_to_the_templates_stops_and_none_means_none():
    ids = TOKENIZER.encode("one. two ### three")
    assert run(ids, (".",))[1].reply == "one"
    assert run(ids, ("three",))[1].reply == "one. two"
    assert run(ids, ())[1].reply == "one. two ### three"


@settings(max_examples=300)
@given(texts, st.sampled_from([None, VICUNA]), st.sampled_from([None, "", " "]))
def test_of_a_form_all_is_shown_but_the_space_before_it(text, template, begins_with):
    ids = TOKENIZER.encode(text)
    answer = AnswerText(TOKENIZER, template, SamplingParams(regex=".*"), begins_with=begins_with)
    shown = "".join(answer.feed(token_id) for token_id in ids) + answer.finish()
    form = TOKENIZER.decode(ids).lstrip()
    assert shown == answer.reply == (form.rstrip() if template else form)


def test_a_possible_stop_is_held_back():
    answer = AnswerText(TOKENIZER, VICUNA, SamplingParams(stop=("xyz",)))
    shown = ""
    for token_id in TOKENIZER.encode("a xy"):
        shown += answer.feed(token_id)
    assert shown == "a"
    assert shown + answer.finish() == "a xy"
