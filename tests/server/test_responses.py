"""POST /v1/responses: what chat completions answer, in the form of responses."""

import httpx
import openai
import pytest
from pydantic import BaseModel
from running import NAME, data_url, long_answer, picture, user

QUESTION = "How many shapes are there?"


def asked_in_parts():
    return [{"role": "user", "content": [
        {"type": "input_image", "image_url": data_url(), "detail": "auto"},
        {"type": "input_text", "text": QUESTION},
    ]}]  # fmt: skip


def chat(server, messages, **more):
    answer = server.openai().chat.completions.create(model=NAME, messages=messages, **more)
    return answer.choices[0].message.content


def create(server, **more):
    with server.openai() as client:
        answer = client.responses.create(model=NAME, **more)
        return list(answer) if more.get("stream") else answer


def test_a_picture_is_answered_as_in_a_chat(server):
    response = create(server, input=asked_in_parts())
    question = user([picture(), {"type": "text", "text": QUESTION}])
    assert response.output_text == chat(server, [question]) != ""
    assert (response.object, response.status, response.error) == ("response", "completed", None)
    assert response.incomplete_details is None
    assert response.usage.input_tokens > 32
    assert response.usage.total_tokens == (
        response.usage.input_tokens + response.usage.output_tokens
    )
    assert response.tools == []
    assert response.store is False


def test_texts_and_instructions(server):
    assert create(server, input="hi").output_text == chat(server, [user("hi")])
    told = create(server, input="hi", instructions="Be brief.")
    assert told.instructions == "Be brief."
    system = {"role": "system", "content": "Be brief."}
    assert told.output_text == chat(server, [system, user("hi")])
    both = create(server, input=[{"role": "developer", "content": "Be kind."}, user("hi")],
                  instructions="Be brief.")  # fmt: skip
    joined = {"role": "system", "content": "Be brief.\nBe kind."}
    assert both.output_text == chat(server, [joined, user("hi")])


def test_settings_are_those_of_a_chat(server):
    hot = {"temperature": 2.0, "top_p": 0.9}
    response = create(server, input="hi", **hot, extra_body={"seed": 7, "top_k": 50})
    expected = chat(server, [user("hi")], **hot, seed=7, extra_body={"top_k": 50})
    assert response.output_text == expected
    assert (response.temperature, response.top_p) == (2.0, 0.9)


def test_an_answer_that_was_cut_is_incomplete(server):
    response = create(server, input="hi", max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.max_output_tokens == response.usage.output_tokens == 3


class Shapes(BaseModel):
    colours: tuple[str, str] | None
    is_empty: bool


def test_the_client_parses_into_a_class(server):
    with server.openai() as client:
        response = client.responses.parse(
            model=NAME, input="hi", text_format=Shapes, max_output_tokens=300,
            extra_body={"logit_bias": {"37": 20}},
        )  # fmt: skip
    assert isinstance(response.output_parsed, Shapes)
    assert (response.text.format.type, response.text.format.name) == ("json_schema", "Shapes")


def test_any_json_object(server):
    wanted = {"format": {"type": "json_object"}}
    response = create(server, input="hi", text=wanted, extra_body={"logit_bias": {"128": 100}})
    assert response.output_text == "{}"
    assert response.text.format.type == "json_object"


def test_an_output_can_be_sent_back_as_it_came(server):
    first = create(server, input=asked_in_parts())
    further = user("And what is in the centre?")
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": []}
    expected = chat(server, [
        user([picture(), {"type": "text", "text": QUESTION}]),
        {"role": "assistant", "content": first.output_text},
        further,
    ])  # fmt: skip
    for output in (first.output, [each.model_dump() for each in first.output]):
        turns = [*asked_in_parts(), reasoning, *output, further]
        assert create(server, input=turns).output_text == expected


def test_a_stream_has_openai_s_events_in_order(server):
    whole = create(server, input=asked_in_parts())
    events = create(server, input=asked_in_parts(), stream=True)
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.completed",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert len(kinds) > 10
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events[4:-4])
    assert text == events[-4].text == events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage == whole.usage
    assert {event.item_id for event in events[3:-2]} == {events[-1].response.output[0].id}


def test_the_client_s_own_stream_of_responses(server):
    with server.openai() as client, client.responses.stream(model=NAME, input="hi") as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text != ""


def test_a_cut_stream_ends_incomplete(server):
    *_, last = create(server, input="hi", max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details.reason == "max_output_tokens"


def test_a_stream_that_fails_is_an_error_for_its_client(start):
    server = start(request_seconds=0.3)
    seen = []
    with server.openai() as client, client.responses.create(
        model=NAME, input="hi", stream=True, extra_body=long_answer()
    ) as stream, pytest.raises(openai.APIError, match=r"longer than 0\.3 seconds"):  # fmt: skip
        seen += (event for event in stream)
    assert seen[-1].type == "response.failed"
    assert seen[-1].response.error.code == "timeout"
    server.wait_until_idle()


@pytest.mark.parametrize(
    "more",
    [
        {"store": True}, {"store": False}, {"tools": []}, {"tool_choice": "auto"},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}}, {"truncation": "disabled"},
        {"include": []}, {"include": ["reasoning.encrypted_content"]}, {"background": False},
        {"reasoning": {"effort": "low"}}, {"metadata": {"a": "b"}}, {"previous_response_id": None},
        {"parallel_tool_calls": True}, {"service_tier": "auto"}, {"top_logprobs": 0},
        {"prompt_cache_key": "k"}, {"user": "me"},
        {"stream_options": {"include_obfuscation": False}},
    ],
    ids=str,
)  # fmt: skip
def test_what_asks_for_nothing_is_taken(server, more):
    assert create(server, input="hi", extra_body=more).status == "completed"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"), ({"background": True}, "background"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {"uniqueItems": True}}}},
         "text.format"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "text.format"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"conversation": "conv_1"}, "conversation"), ({"truncation": "auto"}, "truncation"),
        ({"input": []}, "input"), ({"input": 5}, "input"), ({"input": ...}, "input"),
        ({"input": [{"type": "function_call_output", "output": ""}]}, "input[0].type"),
        ({"input": [user([{"type": "text", "text": "x"}])]}, "input[0].content[0]"),
        ({"input": [user([{"type": "input_image", "file_id": "f"}])]}, "input[0].content[0]"),
        ({"input": [user([{"type": "input_image", "image_url": "data:,x"}])]}, "input"),
        ({"input": "x" * 5_000_000}, "input"), ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 1, "max_output_tokens": 2}, "max_tokens"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_is_wrong_is_named(server, more, param):
    body = {"model": NAME, "input": "hi"} | more
    body = {name: value for name, value in body.items() if value is not ...}
    answer = httpx.post(f"{server.url}/v1/responses", json=body, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


def test_nothing_is_kept(server):
    with pytest.raises(openai.NotFoundError):
        server.openai().responses.retrieve(create(server, input="hi").id)
