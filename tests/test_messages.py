"""Dicts in OpenAI's form and Messages say the same; everything else is refused in words."""

from pathlib import Path

import pytest

from minigpt4_runtime import ImageSource, Message, RequestError, image
from minigpt4_runtime.messages import read_messages


def test_openai_dicts_and_messages_read_alike():
    source = image("cat.jpg")
    for content in (
        [source, "What is this?"],
        [source, {"type": "text", "text": "What is this?"}],
        (source, "What is this?"),
    ):
        (message,) = read_messages([{"role": "user", "content": content}])
        assert message == Message("user", (source, "What is this?"))
    (message,) = read_messages([{"role": "user", "content": "Hello"}])
    assert message.content == ("Hello",)


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", {"url": "cat.png"}])
def test_image_url_parts_become_sources(url):
    part = {"type": "image_url", "image_url": url}
    (message,) = read_messages([{"role": "user", "content": [part]}])
    (source,) = message.content
    assert isinstance(source, ImageSource)
    assert source.value == (url if isinstance(url, str) else url["url"])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "must be a list"),
        ({"role": "user", "content": "x"}, "must be a list"),
        ([], "no message of role 'user'"),
        ([{"role": "assistant", "content": "x"}], "no message of role 'user'"),
        ([{"role": "system", "content": "x"}], "no message of role 'user'"),
        ([{"role": "tool", "content": "x"}], "role is 'tool'"),
        ([{"role": "user"}], "'role' and 'content'"),
        ([{"role": "user", "content": "x", "name": "me"}], "'role' and 'content'"),
        ([{"role": "user", "content": 3}], "string or a list of parts"),
        ([{"role": "user", "content": b"png"}], "image"),
        ([{"role": "user", "content": [{"type": "video"}]}], "A part of content"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "A part of content"),
        ([{"role": "user", "content": [None]}], "A part of content"),
        ([{"role": "user", "content": "caf\udce9"}], "not valid Unicode"),
        (["hello"], "dict with 'role' and 'content'"),
        ([{"role": "system", "content": [image("a.png")]}], "only 'user'"),
    ],
)  # fmt: skip
def test_other_forms_are_refused_in_words(messages, words):
    with pytest.raises(RequestError, match=words):
        read_messages(messages)


def test_messages_check_themselves():
    assert Message("user", "Hello") == Message("user", ("Hello",))
    with pytest.raises(RequestError, match="role is 'robot'"):
        Message("robot", ("x",))
    with pytest.raises(RequestError, match="A part of content"):
        Message("user", (3,))
    with pytest.raises(RequestError, match="'role' and 'content'"):
        Message.read({1: 2, "role": "user"})


def test_sources_have_names_for_people():
    assert image(Path("a") / "cat.jpg").name == str(Path("a") / "cat.jpg")
    assert ImageSource(lambda: b"12", "https://a.example/cat.jpg").name.endswith("cat.jpg")
    assert image(b"12").name == "the picture given as bytes"
    assert len(image("data:image/png;base64," + "A" * 5000).name) < 60
