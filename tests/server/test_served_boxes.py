"""Where a model writes boxes, its answers over HTTP have them as values."""

import base64
import io
import json
from dataclasses import replace

import pytest
from PIL import Image
from running import NAME, running

from minigpt4_runtime import MiniGPT4

BOX = {"label": "a cat", "box": [30, 12, 150, 60], "start": 13, "stop": 32}
REGEX = r"<p>a cat</p> \{<10><20><50><100>\}"


@pytest.fixture(scope="module")
def server():
    with MiniGPT4.load() as model:
        # As one whose template says that it writes boxes.
        model._template = replace(model._template, has_boxes=True)
        with running(model) as started:
            yield started


def asked(**more):
    content = io.BytesIO()
    Image.new("RGB", (300, 60)).save(content, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Where?"}]
    return {"model": NAME, "messages": [{"role": "user", "content": parts}],
            "guided_regex": REGEX, "max_tokens": 99, **more}  # fmt: skip


def test_a_chat_completion_has_them(server):
    message = server.ask(**asked()).json()["choices"][0]["message"]
    assert message["boxes"] == [BOX]
    assert message["content"][BOX["start"] : BOX["stop"]] == "{<10><20><50><100>}"
    # An answer may be sent back as it came.
    again = asked()
    again["messages"] += [message, {"role": "user", "content": "And now?"}]
    assert server.ask(**again).json()["choices"][0]["message"]["boxes"] == [BOX]


def test_a_stream_has_them_in_the_last_piece(server):
    with server.openai() as client:
        chunks = list(client.chat.completions.create(
            **{name: value for name, value in asked().items() if name != "guided_regex"},
            stream=True, extra_body={"guided_regex": REGEX},
        ))  # fmt: skip
    found = [getattr(chunk.choices[0].delta, "boxes", None) for chunk in chunks]
    assert found[-1] == [BOX]
    assert found[:-1] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_response_has_them(server):
    content = asked()["messages"][0]["content"]
    parts = [
        {"type": "input_image", "image_url": content[0]["image_url"]["url"]},
        {"type": "input_text", "text": "Where?"},
    ]
    body = {"model": NAME, "input": [{"role": "user", "content": parts}], "guided_regex": REGEX}
    with server.client() as client:
        whole = client.post("/v1/responses", json=body).json()
        events = client.post("/v1/responses", json={**body, "stream": True}).text
    assert whole["output"][0]["boxes"] == [BOX]
    last = json.loads(events.strip().splitlines()[-1].removeprefix("data: "))
    assert last["response"]["output"][0]["boxes"] == [BOX]


def test_an_answer_without_boxes_has_an_empty_list(server):
    body = asked(guided_regex="none")
    assert server.ask(**body).json()["choices"][0]["message"]["boxes"] == []


def test_a_model_without_boxes_has_no_such_field(server, monkeypatch):
    model = server.parts.chat._model
    monkeypatch.setattr(model, "_template", replace(model._template, has_boxes=False))
    assert "boxes" not in server.ask(**asked()).text
