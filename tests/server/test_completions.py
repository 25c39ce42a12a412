"""POST /v1/completions: texts and ids are continued as they are."""

import openai
import pytest
from running import NAME, user

from minigpt4_runtime import MiniGPT4, SamplingParams

PROMPT = "Human: What do you see?###Assistant: "


def create(server, **more):
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 12} | more
    return server.openai().completions.create(**asked)


def continued(model, text=PROMPT, **more):
    *_, last = model.submit_text(text, SamplingParams(**{"max_new_tokens": 12} | more))
    return last.reply


def test_a_text_goes_on_as_in_the_library(server, model: MiniGPT4):
    answer, expected = create(server), continued(model)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == expected.text != ""
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == len(model.encode_text(PROMPT))
    assert answer.usage.completion_tokens == len(expected.token_ids)


def test_ids_are_taken_for_a_text(server, model):
    ids = list(model.encode_text(PROMPT))
    assert create(server, prompt=ids).choices[0].text == continued(model).text
    many = create(server, prompt=[ids, ids[:5]]).choices
    assert [each.text for each in many] == [continued(model).text, continued(model, ids[:5]).text]


def test_sixteen_tokens_are_the_default_and_the_end_is_heeded(server):
    asked = {"max_tokens": None, "extra_body": {"ignore_eos": True}}
    assert create(server, **asked).usage.completion_tokens == 16
    asked["extra_body"] = {"ignore_eos": True, "min_tokens": 20}
    assert create(server, **asked).usage.completion_tokens == 20


def test_a_template_s_stop_is_none_here(server, model):
    text = create(server, max_tokens=40, extra_body={"ignore_eos": True}).choices[0].text
    assert text == continued(model, max_new_tokens=40, ignore_eos=True).text
    assert "###" in text
    stopped = create(server, max_tokens=40, stop="###").choices[0]
    assert (stopped.text, stopped.finish_reason) == (text.partition("###")[0], "stop")


def test_every_prompt_has_n_texts_with_seeds_of_their_own(server, model):
    prompts = [PROMPT, "Human: Who?"]
    answer = create(server, prompt=prompts, n=2, seed=5, temperature=3.0)
    expected = [
        continued(model, text, temperature=3.0, seed=5 + i) for text in prompts for i in range(2)
    ]
    assert [each.text for each in answer.choices] == [each.text for each in expected]
    assert [each.index for each in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == sum(len(model.encode_text(text)) for text in prompts)
    assert answer.usage.completion_tokens == sum(len(each.token_ids) for each in expected)


@pytest.mark.parametrize(
    "form",
    [
        {"structured_outputs": {"choice": ["three", "four"]}},
        {"guided_regex": "three|four"},
        {"response_format": {"type": "json_schema", "json_schema": {
            "name": "count", "schema": {"enum": ["three", "four"]}}}},
    ],
)  # fmt: skip
def test_a_text_has_the_form_that_is_asked_for(server, form):
    (choice,) = create(server, extra_body=form).choices
    assert choice.text.strip('"') in ("three", "four")
    assert choice.finish_reason == "stop"


def test_biases_and_penalties(server, model):
    plain = continued(model)
    biased = {"logit_bias": {plain.token_ids[1]: -100}, "frequency_penalty": 1.5, "min_p": 0.5}
    expected = continued(model, presence_penalty=0.5, **biased)
    answer = create(server, presence_penalty=0.5, logit_bias={str(plain.token_ids[1]): -100},
                    frequency_penalty=1.5, extra_body={"min_p": 0.5})  # fmt: skip
    assert answer.choices[0].text == expected.text != plain.text


@pytest.mark.parametrize("counts", [True, False])
def test_a_stream_is_the_same_text_in_pieces(server, counts):
    options = {"include_usage": True, "continuous_usage_stats": counts}
    whole = create(server, prompt=[PROMPT, "Human:"])
    *chunks, last = create(server, prompt=[PROMPT, "Human:"], stream=True, stream_options=options)
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(each.text for each in own) == choice.text
        assert own[-1].finish_reason == choice.finish_reason
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(bool(chunk.usage) == counts for chunk in chunks)


@pytest.mark.parametrize("is_stream", [False, True])
def test_logprobs(server, model, is_stream):
    answer = create(server, logprobs=2, stream=is_stream)
    found = [c.choices[0].logprobs for c in (answer if is_stream else [answer])]
    found = [each for each in found if each]
    expected = continued(model, logprobs=2).logprobs
    logprobs = [value for each in found for value in each.token_logprobs]
    assert logprobs == pytest.approx([each.logprob for each in expected], abs=1e-3)
    offsets = [value for each in found for value in each.text_offset]
    tokens = [value for each in found for value in each.tokens]
    assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))]
    assert all(len(top) == 2 for each in found for top in each.top_logprobs)
    assert create(server, logprobs=False).choices[0].logprobs is None


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": []}, "prompt"), ({"prompt": 5}, "prompt"), ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 5]}, "prompt"), ({"prompt": [-1]}, None), ({"prompt": [10**9]}, None),
        ({"echo": True}, "echo"), ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"), ({"prompt": ["a"] * 9}, "n"),
        ({"prompt": "word " * 5000}, "prompt"), ({"prompt": "x" * 5_000_000}, "prompt"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_is_wrong_is_refused(server, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        create(server, extra_body=more)
    assert (caught.value.param or "").startswith(param or "")


def test_a_dialogue_is_no_text(server):
    with pytest.raises(openai.BadRequestError, match="prompt is missing"):
        create(server, prompt=None, extra_body={"messages": [user("hi")]})
