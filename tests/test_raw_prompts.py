"""A prompt that is written as it is gets the answer that a template's gets."""

from pathlib import Path

import pytest

from minigpt4_runtime import MiniGPT4, PromptTooLongError, RequestError, SamplingParams, image

PICTURE = Path(__file__).parents[1] / "examples" / "images" / "three.png"
GREEDY = SamplingParams(max_new_tokens=40)


@pytest.fixture(scope="module")
def model():
    with MiniGPT4.load(device="cpu") as loaded:
        yield loaded


def answer(ticket):
    *_, last = ticket
    return last.reply


def test_what_the_template_writes_by_hand(model):
    asked = [{"role": "user", "content": [image(PICTURE), "How many shapes are there?"]}]
    written = model.encode_prompt(asked)
    reply = answer(model.submit_raw(written.text, [PICTURE], GREEDY))
    assert reply == model.chat(asked, GREEDY)
    assert reply.usage.prompt_tokens == len(written.token_ids)


def test_another_form_of_words(model):
    """Without system text and a space at the end, as research code asks; the laboratory agrees."""
    raw = "###Human: <Img><ImageHere></Img> Describe this image in detail. ###Assistant:"
    lab = model.lab()
    prompt = lab.prompt(raw, [PICTURE])
    reply = answer(model.submit_raw(raw, [PICTURE], GREEDY))
    assert reply.usage.prompt_tokens == len(prompt.token_ids)
    (wanted,) = lab.generate(prompt, max_new_tokens=40)
    assert (reply.text, reply.token_ids) == (wanted.text, wanted.token_ids)
    assert lab.prompt("a</s>b<s>").token_ids == (
        model._tokenizer.bos_id, *lab.ids_of("a"), model._tokenizer.eos_id, *lab.ids_of("b"),
        model._tokenizer.bos_id,
    )  # fmt: skip


def test_what_cannot_be_is_refused_at_once(model):
    with pytest.raises(RequestError, match="1 places <ImageHere> and there are 2 pictures"):
        model.submit_raw("<ImageHere>", [PICTURE, PICTURE])
    with pytest.raises(PromptTooLongError):
        model.submit_raw("a " * 2000)
