"""A server with a cache_window: dialogues without end, and usage that says what has left."""

import json

import pytest
from running import NAME, picture, running, user

from minigpt4_runtime import MiniGPT4

WINDOW = 200
QUESTION = {"type": "text", "text": "What is in this picture?"}


@pytest.fixture(scope="module")
def server():
    with (
        MiniGPT4.load(engine={"cache_window": WINDOW}) as model,
        running(model, max_images=20) as started,
    ):
        yield started


def dialogue(count):
    turn = [user([picture(), QUESTION]), {"role": "assistant", "content": "One red star."}]
    return (turn * count)[:-1]


def test_chat_completions_say_what_has_left(server):
    usage = server.ask(messages=dialogue(12)).json()["usage"]
    assert usage["evicted_tokens"] > WINDOW
    assert 6 < usage["evicted_images"] <= 10
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] < WINDOW + 60


def test_so_do_streams_and_the_official_client(server):
    stream = server.openai().chat.completions.create(
        model=NAME, messages=dialogue(12), stream=True, stream_options={"include_usage": True}
    )
    assert [chunk for chunk in stream][-1].usage.evicted_images > 6


def test_so_do_responses_and_completions(server):
    endless = {"ignore_eos": True, "max_tokens": 600, "model": NAME}
    with server.client() as client:
        completed = client.post("/v1/completions", json={"prompt": "A star", **endless}).json()
        parts = [{"type": "input_text", "text": "Hi"}]
        asked = {"input": [{"role": "user", "content": parts}], **endless}
        response = client.post("/v1/responses", json=asked).json()
    for usage in (completed["usage"], response["usage"]):
        assert usage["evicted_tokens"] > WINDOW
        assert "evicted_images" not in usage


def test_what_fits_has_no_such_counts(server):
    assert "evicted" not in json.dumps(server.ask().json()["usage"])


def test_of_several_answers_the_usage_has_the_most_that_left(server):
    usage = server.ask(n=3, max_tokens=400, ignore_eos=True, temperature=1.0, seed=1).json()[
        "usage"
    ]
    assert usage["completion_tokens"] == 1200
    assert WINDOW < usage["evicted_tokens"] < 400


def test_a_dialogue_of_more_characters_than_the_context_is_taken_and_a_message_is_not(server):
    most = 1024 * 64
    turns = [user("star " * 8), {"role": "assistant", "content": "a" * (most - 1)}, user("Hi")]
    answer = server.ask(messages=[*turns[:2], *turns])
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["evicted_tokens"] > 1024
    refused = server.ask(messages=[user("a" * (most + 1))]).json()["error"]
    assert refused["code"] == "context_length_exceeded"
