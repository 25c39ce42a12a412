"""Bodies that a parser would take long over are refused before one sees them."""

import io
import json
import random
from base64 import b64encode

import pytest
from PIL import Image
from running import IMAGES, NAME, data_url, picture, user

from minigpt4_runtime.server import body as bodies
from minigpt4_runtime.server.failures import Failure
from minigpt4_runtime.server.protocol import ChatRequest, read_request

KEYS = ",".join(f'"{number}":1' for number in range(bodies.MAX_SIGNS // 3 + 1))
NUMBERS = ",".join("1" * (bodies.MAX_SIGNS + 1))
DEEP = "[" * (bodies.MAX_DEPTH + 1)


def refusal(body):
    """What is said of a body; None where it is left to a parser."""
    try:
        bodies.Body(bytearray(body.encode()))
    except Failure as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("{" + KEYS + "}", "signs"),
        ('{"messages":[{' + KEYS + "}]}", "signs"),
        ('{"stop":[' + NUMBERS + "]}", "signs"),
        ('"' * (2 * bodies.MAX_SIGNS + 2), "signs"),
        ('{"a\\"":' * 2 + DEEP, "brackets within"),
        ('{"a":' * (bodies.MAX_DEPTH + 1), "brackets within"),
        ('{"seed":' + "1" * bodies.MAX_BYTES_OUTSIDE_STRINGS + "}", "bytes outside"),
        (" " * bodies.MAX_BYTES_OUTSIDE_STRINGS + "{}", "bytes outside"),
        ('{"user":"' + "é" * (bodies.MAX_TEXT_BYTES // 2 + 1) + '"}', "bytes of text"),
        ('{"url":"data:;base64,' + "é" * (bodies.MAX_TEXT_BYTES // 2) + '"}', "bytes of text"),
        ('{"url":"data:;base64,' + "A B" * (bodies.MAX_TEXT_BYTES // 3) + '"}', "bytes of text"),
        ('{"url":"data:;base64,' + "A=A" * (bodies.MAX_TEXT_BYTES // 3) + '"}', "bytes of text"),
        ('["' + '","'.join(["a" * (bodies.MAX_TEXT_BYTES // 4)] * 5) + '"]', "bytes of text"),
        ('{"user":"' + "\\n" * (bodies.MAX_BACKSLASHES + 1) + '"}', "backslashes"),
        ("\\" * (bodies.MAX_BACKSLASHES + 1), "backslashes"),
    ],
    ids=lambda value: value[:24],
)
def test_what_a_parser_would_take_long_over(body, what):
    assert what.replace("signs", "brackets, commas, colons and strings") in refusal(body)


def test_what_stands_in_strings_is_not_counted():
    text = '[{,:}]"\\' * bodies.MAX_SIGNS
    assert refusal(json.dumps({"a": text, "b": text})) is None
    # Where a string ends depends on how many backslashes stand before a quote.
    for tail in ('\\"', "\\\\", '\\\\\\"'):
        assert refusal('{"a":"' + tail + '","b":' + DEEP) is not None
        assert refusal('{"a":"' + tail + DEEP + '"}') is None


@pytest.mark.parametrize("num_bytes", [100_000, 100_001, 100_002, 3_000_000, 20_000_000])
@pytest.mark.parametrize("escape", [b"/", b"\\/"])
@pytest.mark.parametrize("is_padded", [True, False])
def test_a_large_picture_is_taken_out_whole(num_bytes, escape, is_padded):
    """Some clients write every slash with a backslash before it, and some no padding."""
    picture = random.Random(num_bytes).randbytes(num_bytes)
    base64 = b64encode(picture).replace(b"/", escape)
    url = b"data:image/png;base64," + (base64 if is_padded else base64.rstrip(b"="))
    body = bodies.Body(bytearray(b'{"a":["' + url + b'","' + url[:100] + b'"]}'))
    first, second = json.loads(body.content)["a"]
    assert body.image(first) == picture
    assert len(body.content) < 300
    assert body.image(second) is None
    assert second.encode() == url[:100].replace(b"\\/", b"/")


def test_nobody_can_write_the_name_of_a_picture():
    url = "data:image/png;base64," + "A" * 100_000
    names = {json.loads(bodies.Body(bytearray(f'"{url}"'.encode())).content) for _ in range(9)}
    assert len(names) == 9


def test_a_large_picture_that_is_no_base64_is_refused_in_words(server):
    for url in ("data:image/png;base64," + "A" * 100_001, "data:image/png;base64," + "A!" * 50_000):
        answer = server.ask(messages=[user([picture(url)])])
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_image")
        assert "is not base64" in answer.json()["error"]["message"]


@pytest.mark.parametrize("num_bytes", [30, 100_000])
def test_a_picture_that_cannot_be_read_is_named_as_it_came(server, num_bytes):
    url = "data:image/png;base64," + b64encode(b"x" * num_bytes).decode()
    answer = server.ask(messages=[user([picture(url)])])
    assert "the picture given as a data URL" in answer.json()["error"]["message"]


def test_a_large_picture_is_answered_like_the_same_in_a_file(server):
    content = io.BytesIO()
    large = Image.open(IMAGES / "three.png").convert("RGB")
    large.resize((400, 400)).save(content, "BMP")
    assert content.tell() > bodies.LARGE_IMAGE_BYTES
    url = "data:image/bmp;base64," + b64encode(content.getvalue()).decode()
    question = {"type": "text", "text": "How many shapes are there?"}
    asked = [user([picture(url), question])]
    assert (
        "three"
        in server.ask(messages=asked, max_tokens=40).json()["choices"][0]["message"]["content"]
    )


def test_a_question_far_larger_than_any_model_takes_is_within_the_limits():
    message = {"role": "user", "content": "é" * 300, "refusal": None}
    asked = {"model": NAME, "messages": [message] * 700, "stop": ["a"] * 4}
    for indent in (None, 4):
        assert refusal(json.dumps(asked, indent=indent)) is None


def test_the_worst_that_is_parsed_has_no_more_faults_than_signs():
    """Each fault costs a parser more than the bytes that made it."""
    for values in ("{" + KEYS[:-40] + "}", '{"messages":[{"role":"user","content":[1,1]}]}'):
        with pytest.raises(Failure) as caught:
            read_request(values.encode(), ChatRequest)
        assert refusal(values) is None
        assert len(str(caught.value)) < 300


def test_an_intricate_body_is_answered_so(server):
    with server.client() as client:
        headers = {"Content-Type": "application/json"}
        answer = client.post("/v1/chat/completions", content="{" + KEYS + "}", headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "body_too_complex"


def test_too_much_at_once_is_refused(start):
    """What is on its way is held in memory like what has come."""
    server = start(max_requests=1, max_body_bytes=100_000)
    asked = {"model": NAME, "messages": [user([picture(data_url())])], "max_tokens": 1}
    reader = server.parts.chat._bodies
    reader._num_arriving = 100_000 - 10
    assert server.ask(**asked).json()["error"]["code"] == "queue_full"
    assert reader._num_arriving == 100_000 - 10
    reader._num_arriving = 0
    assert server.ask(**asked).status_code == 200
    assert reader._num_arriving == 0
