"""POST /tokenize gives the very ids that a question would have."""

import pytest
from running import IMAGES, NAME, picture, user

from minigpt4_runtime import image


def tokenize(server, **body):
    with server.client() as client:
        return client.post("/tokenize", json=body)


def test_a_text_s_ids(server, model):
    told = tokenize(server, model=NAME, prompt="Hello there").json()
    assert told["tokens"] == list(model.encode_text("Hello there"))
    assert told["count"] == len(told["tokens"])
    assert told["max_model_len"] == model.config.language.max_position_embeddings
    bare = tokenize(server, prompt="Hello there", add_special_tokens=False).json()
    assert bare["tokens"] == told["tokens"][1:]


def test_a_dialogue_has_as_many_ids_as_its_answer_counts(server, model):
    messages = [
        {"role": "system", "content": "Be brief."},
        user([picture(), {"type": "text", "text": "How many shapes are there?"}]),
    ]
    told = tokenize(server, messages=messages).json()
    asked = [messages[0], user([image(IMAGES / "three.png"), "How many shapes are there?"])]
    assert told["tokens"] == list(model.encode_prompt(asked).token_ids)
    assert told["count"] == server.ask(messages=messages).json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "either prompt or messages"), ({"prompt": 5}, 400, "valid string"),
        ({"prompt": "a", "messages": [user("hi")]}, 400, "either prompt or messages"),
        ({"prompt": "a", "model": "gpt-5"}, 404, "no model 'gpt-5'"),
        ({"prompt": "x" * 5_000_000}, 400, "5,000,000 characters"),
        ({"messages": [user([picture("data:,")] * 9)]}, 400, "9 pictures"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "no message of role 'user'"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_is_wrong_is_refused(server, body, status, words):
    answer = tokenize(server, **body)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
