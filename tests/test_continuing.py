"""An answer that was begun is continued as the model itself would; so is any text as it is."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_runtime import Message, MiniGPT4, RequestError, SamplingParams, image
from minigpt4_runtime.text.answer import AnswerText
from minigpt4_runtime.text.prompt import TEMPLATES, render
from minigpt4_runtime.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(__file__).parent / "goldens/vicuna/checkpoint/llama/tokenizer.model")
PICTURE = Path(__file__).parents[1] / "examples" / "images" / "three.png"
QUESTION = {"role": "user", "content": [image(PICTURE), "How many shapes are there?"]}


@pytest.fixture(scope="module")
def model():
    with MiniGPT4.load() as loaded:
        yield loaded


def begun(text):
    return [QUESTION, {"role": "assistant", "content": text}]


def test_every_beginning_of_an_answer_leads_to_the_rest_of_it(model):
    whole = model.chat([QUESTION])
    asked, words = model.encode_prompt([QUESTION]), whole.text.split(" ")
    assert len(words) > 3
    for number in range(len(words) + 1):
        start = " ".join(words[:number])
        further = model.chat(begun(start))
        assert start + further.text == whole.text
        prompt = model.encode_prompt(begun(start))
        assert further.usage.prompt_tokens == len(prompt.token_ids)
        assert prompt.token_ids + further.token_ids == asked.token_ids + whole.token_ids
        assert "".join(delta.text for delta in model.stream(begun(start))) == further.text


def test_a_space_at_the_end_of_the_beginning_is_not_said_twice(model):
    whole = model.chat([QUESTION]).text
    first, rest = whole.split(" ", 1)
    assert model.chat(begun(f"{first} ")).text == rest
    assert model.chat(begun(f"{first}\n")).text == rest
    assert model.chat(begun(" ")).text == whole
    assert model.chat(begun("")).text == whole


def test_beams_continue_too(model):
    beams = SamplingParams(num_beams=3)
    whole = model.chat([QUESTION], beams).text
    first = whole.split(" ")[0]
    assert model.chat(begun(first), beams).text.startswith(" ")


@settings(max_examples=200)
@given(st.text(st.sampled_from("ab# \n.é世"), max_size=20), st.data())
def test_halves_are_the_whole_where_a_space_stands_before_words(text, data):
    """Whatever the ids: the beginning's text and what follows it make up the text of all ids."""
    text = " ".join(text.split())
    cut = data.draw(st.sampled_from([i for i, c in enumerate(text) if c == " "] or [len(text)]))
    start, rest = text[:cut], TOKENIZER.encode(text[cut:].strip())
    before, space = TOKENIZER.encode_begun(start)
    answer = AnswerText(
        TOKENIZER,
        TEMPLATES["vicuna"],
        SamplingParams(stop=()),
        before=before,
        begins_with=space if before else None,
    )
    shown = "".join(answer.feed(token_id) for token_id in rest) + answer.finish()
    assert start + shown == text
    assert answer.reply == shown


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answer_s_turn_stays_open(name):
    template = TEMPLATES[name]
    asked, said = Message("user", ("Hi",)), Message("assistant", ("A cat.",))
    prompt = render([asked, said], template)
    assert prompt.begun == "A cat."
    assert prompt.text == render([asked], template).text + "A cat."
    twice = render([asked, said, Message("assistant", ("It",))], template)
    assert twice.text.endswith(f"A cat.{template.separator}{template.assistant}It")


def test_a_text_is_continued_as_it_is(model):
    prompt = model.encode_prompt([{"role": "user", "content": "What do you see?"}])
    sampling = SamplingParams(max_new_tokens=24)
    reply = model.chat([{"role": "user", "content": "What do you see?"}], sampling)
    by_ids = list(model.submit_text(prompt.token_ids, sampling))
    ids = by_ids[-1].reply.token_ids
    assert ids[: len(reply.token_ids)] == reply.token_ids
    assert by_ids[-1].reply.text.split("###")[0].strip() == reply.text
    assert "".join(delta.text for delta in by_ids) == by_ids[-1].reply.text
    by_text = list(model.submit_text("Human: What do you see?", sampling))[-1]
    expected = tuple(
        model.probe.submit_tokens(model.encode_text("Human: What do you see?"), sampling)
    )
    assert by_text.reply.token_ids == expected
    assert by_text.usage == by_text.reply.usage


def test_a_form_is_that_of_the_continuation_without_the_space_before_it(model):
    answers = [
        model.stream(begun("There are"), SamplingParams(regex="three|four")),
        model.stream(begun("There are "), SamplingParams(regex="three|four")),
        model.submit_text("There are", SamplingParams(regex="three|four")),
    ]
    for deltas in map(list, answers):
        assert deltas[-1].reply.text in ("three", "four")
        assert "".join(delta.text for delta in deltas) == deltas[-1].reply.text


def test_a_form_s_text_ends_as_the_form_does_and_at_no_stop_of_a_template(model):
    reply = list(model.submit_text("Human:", SamplingParams(regex="a### b\n")))[-1].reply
    assert reply.text == "a### b\n"


def test_a_stop_string_ends_a_text_and_no_template_does(model):
    sampling = SamplingParams(max_new_tokens=24, ignore_eos=True)
    free = list(model.submit_text("Human:", sampling))[-1].reply
    assert len(free.token_ids) == 24
    word = free.text.split()[-1]
    cut = list(model.submit_text("Human:", SamplingParams(
        max_new_tokens=24, ignore_eos=True, stop=(word,)
    )))[-1].reply  # fmt: skip
    assert cut.text == free.text[: free.text.index(word)]
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize("given", [(), (-1,), (10**6,)])
def test_ids_that_are_none_are_refused(model, given):
    with pytest.raises(RequestError, match="ids from 0 to"):
        model.submit_text(given)
