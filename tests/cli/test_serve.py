"""`minigpt4 serve`: what is wrong is told before a model is loaded. tests/server/ has the rest."""

import socket
from pathlib import Path

import fake_api
import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "Give --api-key-file, or --insecure"),
        (["--api-key-file", "none"], "none cannot be read as a file of API keys"),
        (["--log-format", "xml"], "it must be plain or json"),
        (["--max-requests", "0"], "max_requests is 0; it must be above 0"),
        (["--stall-seconds", "-1"], "stall_seconds is -1.0"),
        (["--allow-media-domain", "http://a.example/"], "is no host"),
        (["--allow-media-dir", "none"], "none is no folder"),
        # Were they not told first, the port would be, and no server waits here for ever.
        (["--ui", "--pictures", "none", "--port", "99999"], "none is no folder with pictures in"),
        (["--ui", "--pictures", "a.png", "--port", "99999"], "a.png is no folder with pictures in"),
        (["--pictures", "."], "--pictures is for the chat page. Add --ui"),
        (["--explain", "--tensor-parallel", "2"], "leave out --tensor-parallel"),
        (["--trusted-proxy", "a.example"], "A proxy is named by its address or network"),
        (["--port", "99999"], "Cannot listen on 127.0.0.1 port 99999"),
    ],
)
def test_wrong_settings(minigpt4, folder, arguments, words):
    outcome = minigpt4("serve", *arguments)
    assert outcome.status == 1
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert words in outcome.err
    assert not fake_api.FakeMiniGPT4.loaded


def test_limits_on_connections_reach_the_server():
    from minigpt4_runtime.cli import serve
    from minigpt4_runtime.cli.options import ModelOptions
    from minigpt4_runtime.server.settings import ConnectionLimits

    access = serve.AccessOptions(trusted_proxy=["192.0.2.0/24"])
    for given, per_client in ((7, 7), (0, None)):
        limits = serve.LimitOptions(max_connections=9, max_connections_per_client=given)
        config = serve._settings(access, limits, ModelOptions(), name="a", log_content=False)
        wanted = ConnectionLimits(most=9, per_client=per_client, proxies=("192.0.2.0/24",))
        assert config.connections == wanted


@pytest.mark.parametrize("name", [None, "demo-boxes", "another"])
def test_a_bundled_model_is_served_as_one(name):
    from minigpt4_runtime.cli import serve
    from minigpt4_runtime.cli.options import ModelOptions

    where = ModelOptions(model=name and Path(name))
    access, limits = serve.AccessOptions(), serve.LimitOptions()
    config = serve._settings(access, limits, where, name="a", log_content=False)
    assert ("drawn scenes" in config.model_description) == (name != "another")


def test_a_window_reaches_the_engine(monkeypatch):
    from minigpt4_runtime.cli import serve
    from minigpt4_runtime.cli.options import ModelOptions

    given = {}
    monkeypatch.setattr(ModelOptions, "load", lambda _, **settings: given.update(settings))
    access, where = serve.AccessOptions(), ModelOptions()
    limits = serve.LimitOptions(cache_window=300)
    config = serve._settings(access, limits, where, name="a", log_content=False)
    serve._load(where, limits, config, announce_demo=False)
    assert given["engine"].cache_window == 300


@pytest.mark.parametrize(("is_insecure", "own_names_only"), [(False, True), (True, False)])
def test_without_keys_it_answers_to_its_own_names_unless_told_otherwise(
    is_insecure, own_names_only
):
    from minigpt4_runtime.cli import serve
    from minigpt4_runtime.cli.options import ModelOptions

    access, limits = serve.AccessOptions(insecure=is_insecure), serve.LimitOptions()
    config = serve._settings(access, limits, ModelOptions(), name="a", log_content=False)
    assert config.own_names_only is own_names_only


@pytest.mark.parametrize("url", ["nonsense", "localhost:8000", "http://", "ftp://a.example"])
def test_the_page_is_told_a_url(minigpt4, url):
    outcome = minigpt4("web", "--url", url, "--port", "99999")
    assert (outcome.status, outcome.out) == (1, "")
    assert f"error: --url is {url!r}; it must begin with http://" in outcome.err


def test_a_body_of_nothing_is_wrong_usage_of_that_very_option(minigpt4):
    outcome = minigpt4("serve", "--max-body-mib", "0")
    assert outcome.status == 2
    assert "'--max-body-mib'" in outcome.err


def test_a_port_that_is_taken(minigpt4):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        outcome = minigpt4("serve", "--port", taken.getsockname()[1])
    assert outcome.status == 1
    assert "Give another --port" in outcome.err
    assert not fake_api.FakeMiniGPT4.loaded


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [("fastapi", [], "server"), ("gradio", ["--ui", "--port", "99999"], "web")],
)
def test_without_the_extra_it_says_what_to_install(
    minigpt4, monkeypatch, missing, arguments, extra
):
    import importlib

    real = importlib.import_module

    def import_module(name, *rest):
        if name == missing:
            raise ModuleNotFoundError(name=name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", import_module)
    outcome = minigpt4("serve", *arguments)
    assert outcome.status == 1
    assert f"pip install 'minigpt4-runtime[{extra}]'" in outcome.err
    assert not fake_api.FakeMiniGPT4.loaded
