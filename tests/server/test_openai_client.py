"""The official client works unchanged."""

import asyncio
import math

import openai
import pytest
from running import IMAGES, NAME, data_url, picture, user

from minigpt4_runtime import MiniGPT4, SamplingParams, image

QUESTION = "How many shapes are there?"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def test_models(server):
    client = server.openai()
    assert [each.id for each in client.models.list()] == [NAME]
    card = client.models.retrieve(NAME)
    assert card.owned_by == "minigpt4-runtime"
    assert card.description == "It describes pictures and answers questions about them."
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
        client.models.retrieve("gpt-5")


def test_a_model_may_have_slashes_in_its_name(start):
    server = start(model_name="someone/minigpt4")
    client = server.openai()
    (card,) = client.models.list()
    assert client.models.retrieve(card.id) == card
    with server.client() as plain:
        assert plain.get("/v1/models/").json() == plain.get("/v1/models").json()
        assert plain.get("/v1/models/someone%2Fminigpt4").json()["id"] == "someone/minigpt4"


@pytest.mark.parametrize(("base", "words"), [("", "end in /v1"), ("/v1/v1", "/v1 twice")])
def test_a_wrong_base_url_is_told_what_is_wrong_with_it(server, base, words):
    with openai.OpenAI(base_url=server.url + base, api_key="none", max_retries=0) as client:
        for ask in (
            client.models.list,
            lambda: client.models.retrieve(NAME),
            lambda: client.chat.completions.create(model=NAME, messages=[user("hi")]),
        ):
            with pytest.raises(openai.NotFoundError, match=words):
                ask()


def test_chat_about_a_picture_answers_as_the_library(server, model: MiniGPT4):
    content = [picture(), {"type": "text", "text": QUESTION}]
    answer = server.openai().chat.completions.create(model=NAME, messages=[user(content)])
    reply = model.chat([user([image(IMAGES / "three.png"), QUESTION])])
    assert answer.choices[0].message.content == reply.text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == reply.usage.prompt_tokens
    assert answer.usage.completion_tokens == reply.usage.completion_tokens
    assert answer.usage.total_tokens == sum((reply.usage.prompt_tokens,
                                             reply.usage.completion_tokens))  # fmt: skip
    assert answer.choices[0].logprobs is None


def test_the_question_may_stand_before_its_picture(server):
    content = [picture(), {"type": "text", "text": QUESTION}]
    answers = [
        server.openai().chat.completions.create(model=NAME, messages=[user(parts)])
        for parts in (content, content[::-1])
    ]
    assert answers[1].choices[0].message == answers[0].choices[0].message
    assert answers[1].usage == answers[0].usage


def test_an_answer_can_be_sent_back_as_it_came(server):
    client = server.openai()
    messages = [user([picture(), {"type": "text", "text": QUESTION}])]
    first = client.chat.completions.create(model=NAME, messages=messages).choices[0].message
    echoes = [
        first, first.model_dump(), first.to_dict(), {"role": "assistant", "content": first.content},
    ]  # fmt: skip
    answers = [
        client.chat.completions.create(
            model=NAME, messages=[*messages, echo, user("And what is in the centre?")]
        )
        for echo in echoes
    ]
    assert first.content
    assert len({answer.choices[0].message.content for answer in answers}) == 1


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_last_message_by_the_assistant_is_continued(server, is_stream):
    client = server.openai()
    asked = [user([picture(), {"type": "text", "text": QUESTION}])]
    whole = client.chat.completions.create(model=NAME, messages=asked).choices[0].message.content
    begun = whole.partition(" three")[0]
    answer = client.chat.completions.create(
        model=NAME, messages=[*asked, {"role": "assistant", "content": begun}], stream=is_stream
    )
    text = (
        "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        if is_stream
        else answer.choices[0].message.content
    )
    assert begun + text == whole


def test_stream_is_the_same_text_in_pieces(server):
    client = server.openai()
    asked = {"model": NAME, "messages": [user([picture(), {"type": "text", "text": QUESTION}])]}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) > 2
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    assert last.choices == []
    assert last.usage.completion_tokens > 0


def test_every_piece_counts_when_asked(server):
    chunks = list(
        server.openai().chat.completions.create(
            model=NAME, messages=[user("hi")], stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
    )  # fmt: skip
    *pieces, last = chunks
    counts = [each.usage.completion_tokens for each in pieces if each.choices[0].delta.content]
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1] <= last.usage.completion_tokens
    assert {each.usage.prompt_tokens for each in chunks if each.usage} == {last.usage.prompt_tokens}


@pytest.mark.parametrize("question", ["hi", QUESTION])
def test_no_end_is_heeded_when_none_is_wanted(server, question):
    """As load tools ask: so many tokens, whatever they are."""
    answer = server.openai().chat.completions.create(
        model=NAME, messages=[user([picture(), {"type": "text", "text": question}])],
        max_tokens=48, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert answer.usage.completion_tokens == 48
    assert answer.choices[0].finish_reason == "length"


def test_stream_without_usage_has_none(server):
    stream = server.openai().chat.completions.create(
        model=NAME, messages=[user("hi")], max_tokens=4, stream=True
    )
    assert all(chunk.choices and chunk.usage is None for chunk in stream)


def test_stream_manager_of_the_client(server):
    with server.openai().chat.completions.stream(model=NAME, messages=[user("hi")]) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    assert stream.get_final_completion().choices[0].message.content == text != ""


@pytest.mark.parametrize("is_stream", [False, True])
def test_logprobs(server, model, is_stream):
    answer = server.openai().chat.completions.create(
        model=NAME, messages=[user("hi")], logprobs=True, top_logprobs=3, stream=is_stream
    )
    chunks = list(answer) if is_stream else [answer]
    found = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    expected = model.chat([user("hi")], SamplingParams(logprobs=3))
    assert [token.logprob for token in found] == pytest.approx(
        [each.logprob for each in expected.logprobs], abs=1e-3
    )
    assert all(len(token.top_logprobs) == 3 for token in found)
    assert found[0].top_logprobs[0].token == found[0].token
    text = b"".join(bytes(token.bytes) for token in found).decode()
    assert expected.text in text
    assert math.exp(found[0].logprob) <= 1


def test_seeds_give_the_same_and_choices_differ(server, model):
    client = server.openai()
    asked = {
        "model": NAME, "messages": [user("Tell me something.")], "temperature": 2.0,
        "seed": 7, "n": 3,
    }  # fmt: skip
    first, second = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    alone = [
        model.chat(asked["messages"], SamplingParams(temperature=2.0, seed=7 + i)).text
        for i in range(3)
    ]
    assert texts == alone
    assert len(set(texts)) > 1


def test_choices_share_the_prompt(server, model):
    before = model.stats()
    answer = server.openai().chat.completions.create(
        model=NAME,
        messages=[user([picture(), {"type": "text", "text": "Where is it, pray?"}])],
        n=4,
    )
    assert len({choice.message.content for choice in answer.choices}) == 1
    assert model.stats().num_reused_tokens > before.num_reused_tokens
    single = server.openai().chat.completions.create(
        model=NAME, messages=[user([picture(), {"type": "text", "text": "Where is it, pray?"}])]
    )
    assert answer.usage.prompt_tokens == single.usage.prompt_tokens
    assert answer.usage.completion_tokens == 4 * single.usage.completion_tokens


def test_extensions_and_stops(server, model):
    client, messages = (
        server.openai(),
        [user([picture(), {"type": "text", "text": "Describe it."}])],
    )
    own = [user([image(IMAGES / "three.png"), "Describe it."])]
    extra = {"top_k": 5, "repetition_penalty": 1.3, "num_beams": 3, "length_penalty": -1.0}
    answer = client.chat.completions.create(model=NAME, messages=messages, extra_body=extra)
    assert answer.choices[0].message.content == model.chat(own, SamplingParams(**extra)).text
    full = client.chat.completions.create(model=NAME, messages=messages).choices[0].message.content
    stop = full.split()[2]
    cut = client.chat.completions.create(model=NAME, messages=messages, stop=[stop])
    assert cut.choices[0].message.content == full.partition(stop)[0].strip()
    short = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 2


def test_errors_are_the_client_s_own(server):
    client = server.openai()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=[user("hi")], tools=[TOOL])
    assert caught.value.param == "tools"
    assert caught.value.code == "unsupported_parameter"
    assert "calls no tools" in str(caught.value)
    assert "response_format" in str(caught.value)
    assert caught.value.request_id.startswith("req-")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
        client.chat.completions.create(model="gpt-5", messages=[user("hi")])


def test_async_client(server):
    async def ask_many():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none")
        async with client:
            content = [picture(data_url("two.png")), {"type": "text", "text": QUESTION}]
            whole, stream = await asyncio.gather(
                client.chat.completions.create(model=NAME, messages=[user(content)]),
                client.chat.completions.create(model=NAME, messages=[user(content)], stream=True),
            )
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return whole.choices[0].message.content, "".join(pieces)

    whole, streamed = asyncio.run(ask_many())
    assert whole == streamed != ""
