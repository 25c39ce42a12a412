"""POST /explain says where a word of an answer looked, as the laboratory does."""

from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
from running import IMAGES, NAME, picture, running, user

from minigpt4_runtime import MiniGPT4, RequestError, image
from minigpt4_runtime.server.app import create_app
from minigpt4_runtime.server.settings import ServerConfig

QUESTION = "How many shapes are there?"
ANSWER = "There are three shapes."


@pytest.fixture(scope="module")
def explaining(model):
    with running(model, explains=True) as started:
        yield started


def explain(server, **body):
    with server.client() as client:
        return client.post("/explain", json=body)


def asked(text=QUESTION, **more):
    return {"messages": [user([picture(), {"type": "text", "text": text}])], **more}


def test_a_word_looks_where_the_laboratory_says(explaining, model):
    told = explain(explaining, **asked(answer=ANSWER, at=12), model=NAME).json()
    assert (told["word"], told["start"], told["stop"]) == ("three", 10, 15)
    lab = model.lab()
    prompt = lab.prompt([user([image(IMAGES / "three.png"), QUESTION])])
    found = lab.explain(prompt, ANSWER)
    (word,) = (each for each in found.words if each.text == "three")
    (heat,) = told["heat"]
    assert numpy.array(heat) == pytest.approx(found.heat_of(word)[0, 0], abs=1e-5)
    assert told["on_pictures"] == pytest.approx(found.on_pictures(word), abs=1e-5)
    # Characters are those of the answer as it was sent, white space and emoji too.
    for before in (" \n\t", "😀 "):
        told = explain(explaining, **asked(answer=f"{before}{ANSWER}", at=len(before) + 14)).json()
        assert (told["word"], told["start"]) == ("three", len(before) + 10)
    # Of a text without pictures there is nothing to see.
    told = explain(explaining, messages=[user("Hello")], answer="Hi", at=0).json()
    assert (told["word"], told["heat"], told["on_pictures"]) == ("Hi", [], 0)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (asked(answer=ANSWER, at=len(ANSWER)), 400, f"at is 23; the answer has {len(ANSWER)}"),
        (asked(answer="   ", at=0), 400, "none behind them"),
        (asked(answer=ANSWER, at=-1), 400, "at: "), (asked(answer=ANSWER), 400, "at is missing"),
        (asked(answer="", at=0), 400, "answer: "),
        (asked(answer=ANSWER, at=0, model="gpt-5"), 404, "no model 'gpt-5'"),
        (asked(answer="x" * 5_000_000, at=0), 400, "5,000,000 characters"),
        (asked(answer="a " * 2000, at=3000), 400, "tokens"),
        ({"messages": [], "answer": "a", "at": 0}, 400, "messages: "),
        ({"messages": [user([picture("/none")])], "answer": "a", "at": 0}, 400, ""),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(explaining, body, status, words):
    answer = explain(explaining, **body)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_it_is_there_only_where_it_was_asked_for(server, explaining):
    assert explain(server, **asked(answer=ANSWER, at=0)).status_code == 404
    for each, explains in ((server, False), (explaining, True)):
        with each.client() as client:
            (card,) = client.get("/v1/models").json()["data"]
            paths = client.get("/openapi.json").json()["paths"]
        assert card["explains"] is explains
        assert ("/explain" in paths) is explains


def test_answers_go_on_beside_it(explaining):
    """The engine's answers are the same while words are looked at."""
    alone = explaining.ask(messages=asked()["messages"]).json()
    with ThreadPoolExecutor(6) as threads:
        looks = [
            threads.submit(explain, explaining, **asked(answer=ANSWER, at=at)) for at in (0, 6, 12)
        ]
        answers = [threads.submit(explaining.ask, messages=asked()["messages"]) for _ in range(3)]
    assert [look.result().json()["word"] for look in looks] == ["There", "are", "three"]
    for each in answers:
        assert each.result().json()["choices"] == alone["choices"]


def test_ranks_cannot_be_looked_into(monkeypatch, model):
    def refuse(_):
        raise RequestError("Ranks share this model.")

    monkeypatch.setattr(MiniGPT4, "lab", refuse)
    with pytest.raises(RequestError, match="Ranks share"):
        create_app(model, ServerConfig(model_name="demo", explains=True))
