"""A server with several adapters: a request's model chooses, and each answers as it does alone."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy
import pytest
from adapter_folders import write_lora, write_projection
from running import NAME, picture, running, user

from minigpt4_runtime import ConfigError, MiniGPT4
from minigpt4_runtime.api import DEMO_MODEL_DIR
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.cli.options import ServedOptions
from minigpt4_runtime.server.app import create_app
from minigpt4_runtime.server.settings import ServerConfig

NAMES = [NAME, "words", "sight"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    made = tmp_path_factory.mktemp("adapters")
    write_lora(made / "words", load_config(DEMO_MODEL_DIR).language, seed=1, size=0.7)
    write_projection(made / "sight.safetensors", DEMO_MODEL_DIR, seed=2, size=2.0)
    return [f"words={made / 'words'}", f"sight={made / 'sight.safetensors'}"]


@pytest.fixture(scope="module")
def server(paths):
    model = ServedOptions(adapter=paths, device="cpu").load()
    with model, running(model, explains=True) as started:
        yield started


def answer(server, name):
    body = {"messages": [user([picture(), {"type": "text", "text": "Describe it."}])]}
    answered = server.ask(model=name, **body, max_tokens=12).json()
    assert answered["model"] == name
    return answered["choices"][0]["message"]["content"]


def test_the_models_name_chooses(server):
    alone = [answer(server, name) for name in NAMES]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(lambda name: answer(server, name), NAMES)) == alone
    with server.client() as client:
        for path, more in (("completions", {"prompt": "A red"}), ("responses", {"input": "hi"})):
            body = {"model": "words", "max_tokens": 8, **more}
            answered = client.post(f"/v1/{path}", json=body)
            assert answered.json().get("model") == "words", answered.text


def test_a_word_is_looked_at_under_the_adapter_that_said_it(server, paths):
    """As in the laboratory of a model that has it for all requests."""
    asked = [user([picture(), {"type": "text", "text": "Describe it."}])]
    heats = []
    for name, given in zip(NAMES, (None, *paths), strict=True):
        body = {"messages": asked, "answer": "A red star.", "at": 7, "model": name}
        with server.client() as client:
            told = client.post("/explain", json=body).json()
        adapter = given and given.partition("=")[2]
        with MiniGPT4.load(adapter=adapter, device="cpu") as model:
            lab = model.lab()
            wanted = lab.look(lab.prompt(asked), "A red star.", 7)
        assert told["word"] == wanted.word
        assert told["on_pictures"] == pytest.approx(wanted.on_pictures, abs=1e-5)
        assert numpy.array(told["heat"]) == pytest.approx(wanted.heat, abs=1e-5)
        heats.append(told["heat"])
    assert heats[0] != heats[1] != heats[2] != heats[0]


def test_models_are_listed(server):
    with server.client() as client:
        cards = client.get("/v1/models").json()["data"]
        assert [(each["id"], each["parent"]) for each in cards] == [
            (NAME, None), ("words", NAME), ("sight", NAME),
        ]  # fmt: skip
        assert all(each["explains"] for each in cards)
        assert client.get("/v1/models/sight").json()["id"] == "sight"
        for missing in (client.get("/v1/models/other"), server.ask(model="other")):
            assert missing.status_code == 404
            message = missing.json()["error"]["message"]
            assert message.endswith(f"these are '{NAME}', 'words', 'sight'.")
        asked = {"model": "words", "prompt": "hi"}
        assert client.post("/tokenize", json=asked).json()["count"] > 1


def test_names_that_cannot_be(server, paths, tmp_path):
    for given, message in (
        (["a=x", "a=y"], "names 'a' twice"), (["a=x", "y"], "'y'; of several, each is NAME=PATH"),
        (["=x"], "each is NAME=PATH"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            ServedOptions(adapter=given).arguments()
    assert ServedOptions(adapter=["x"]).arguments()["adapter"] == "x"
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert ServedOptions(adapter=[str(odd)]).arguments()["adapter"] == str(odd)
    model = SimpleNamespace(adapters=(NAME,), tasks=(), engine_config=None, stats=None)
    with pytest.raises(ConfigError, match="and an adapter are both named 'minigpt4-demo'"):
        create_app(model, ServerConfig(model_name=NAME))
