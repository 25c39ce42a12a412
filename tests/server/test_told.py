"""What the server tells of itself: readiness, metrics, logs, its own description."""

import asyncio
import gc
import http.client
import json
import logging
import re
import subprocess
import sys

import pytest
from running import NAME, data_url, long_answer, picture, user, wait_for

import minigpt4_runtime
from minigpt4_runtime.server import logs


def readings(server):
    with server.client() as client:
        text = client.get("/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(\w\S*) (\S+)$", text, re.M)}


def test_alive_and_ready(server):
    with server.client() as client:
        assert client.get("/health").json() == {"status": "alive", "reason": None}
        assert client.get("/ready").json() == {"status": "ready", "reason": None}


def test_version(server):
    with server.client() as client:
        assert client.get("/version").json() == {"version": minigpt4_runtime.__version__}


def test_metrics_count_what_happens(server):
    server.wait_until_idle()
    before = readings(server)
    content = [picture(data_url("four.png")), {"type": "text", "text": "Count, please."}]
    server.ask(messages=[user(content)], max_tokens=20)
    server.ask(messages=[user(content)], max_tokens=20)
    server.ask(messages=[])
    after = readings(server)

    def grown(name):
        return after[name] - before.get(name, 0.0)

    route = 'route="/v1/chat/completions"'
    assert grown(f'minigpt4_requests_total{{outcome="ok",{route}}}') == 2
    assert grown(f'minigpt4_requests_total{{outcome="refused",{route}}}') == 1
    assert grown("minigpt4_images_total") == 2
    assert grown("minigpt4_encoded_images_total") <= 1
    assert grown("minigpt4_cached_tokens_total") > 16
    assert grown("minigpt4_time_to_first_token_seconds_count") == 2
    assert grown("minigpt4_time_per_token_seconds_count") == 2
    assert grown('minigpt4_tokens_total{kind="prompt"}') > 2 * 16
    assert grown('minigpt4_tokens_total{kind="answer"}') > 2
    assert grown("minigpt4_steps_total") > 2
    assert after["minigpt4_image_encode_seconds_total"] > 0
    for gauge in ("running", "queued", "admitted", "cache_blocks_used", "preemptions_total"):
        assert after[f"minigpt4_{gauge}"] >= 0
    assert after["minigpt4_cache_blocks"] > 0


def test_paths_that_clients_make_up_are_no_labels(server):
    with server.client() as client:
        client.get("/made/up/by/a/client")
    assert not any("made" in name for name in readings(server))


def test_request_ids(server):
    with server.client() as client:
        assert client.get("/health", headers={"X-Request-Id": "my-id"}).headers[
            "x-request-id"] == "my-id"  # fmt: skip
        for bad in ("a b", 'x"y', "x" * 65, ""):
            answer = client.get("/health", headers={"X-Request-Id": bad})
            assert answer.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_request_s_line_has_no_content(server, caplog, is_stream):
    caplog.set_level(logging.INFO, logs.logger.name)
    secret = "XYZZYsecret"
    with server.client() as client:
        client.post(
            "/v1/chat/completions?key=XYZZYkey",
            json={"model": NAME, "messages": [user([picture(), {"type": "text", "text": secret}])],
                  "stream": is_stream, "user": "XYZZYuser"},
            headers={"Authorization": "Bearer XYZZYkey", "X-Request-Id": f"r-{is_stream}"},
        )  # fmt: skip
        client.post("/v1/chat/completions", json={"model": secret, "messages": [user(secret)]})
    wait_for(lambda: len(caplog.records) >= 2)
    lines = [logs.JsonFormatter().format(record) for record in caplog.records]
    lines += [logs.PlainFormatter().format(record) for record in caplog.records]
    assert lines
    assert not any("XYZZY" in line or "base64" in line for line in lines)
    told = [json.loads(line) for line in lines if line.startswith("{")]
    (own,) = [each for each in told if each["request_id"] == f"r-{is_stream}"]
    assert own["outcome"] == "ok"
    assert own["route"] == "/v1/chat/completions"
    assert own["answer_tokens"] > 0


def test_content_is_logged_when_asked(start, caplog):
    caplog.set_level(logging.INFO, logs.logger.name)
    start(logs_content=True).ask(messages=[user("a plain question")])

    def told():
        fields = [getattr(record, "fields", {}) for record in caplog.records]
        return [each for each in fields if each.get("answers")]

    wait_for(told)  # The line is written after the answer is out.
    assert "a plain question" in str(told()[0]["messages"])


def test_a_log_line_stays_a_line():
    record = logging.makeLogRecord({"msg": "request", "fields": {"path": "a\nb\u2028c", "n": 1}})
    for form in (logs.PlainFormatter(), logs.JsonFormatter()):
        assert len(form.format(record).splitlines()) == 1
    assert json.loads(logs.JsonFormatter().format(record))["path"] == "a\nb\u2028c"


@pytest.mark.parametrize("form", ["json", "plain"])
def test_what_libraries_warn_of_has_the_same_form(form):
    script = f"""
import logging, warnings
from minigpt4_runtime.server import logs
logs.set_up_logs({form!r})
logging.getLogger("their.package").warning("two\\nlines")
logging.getLogger("their.package").info("nobody asked")
warnings.warn("old", stacklevel=1)
logs.log("ours", number=1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    if form == "json":
        events = [json.loads(line)["event"] for line in lines]
        assert events[0] == "two lines"
        assert "UserWarning: old" in events[1]
        assert events[2] == "ours"
    else:
        assert all(re.match(r"20\d\d-\S+ (info|warning) +\S", line) for line in lines)


@pytest.mark.parametrize("form", [logs.PlainFormatter(), logs.JsonFormatter()])
def test_an_error_that_nobody_awaits_is_not_quoted(caplog, form):
    async def fail():
        raise ValueError("XYZZY prompt")

    async def forget():
        failing = asyncio.create_task(fail())
        await asyncio.wait({failing})

    asyncio.run(forget())
    gc.collect()
    (line,) = [form.format(record) for record in caplog.records if record.name == "asyncio"]
    assert "never retrieved" in line
    assert "ValueError" in line
    assert "XYZZY" not in line


def test_an_unexpected_error_is_a_500_that_quotes_nothing(start, caplog, monkeypatch):
    server = start()

    def fail(*_):
        raise ValueError("XYZZY prompt")

    monkeypatch.setattr("minigpt4_runtime.server.chat.read_request", fail)
    answer = server.ask()
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    lines = [logs.PlainFormatter().format(record) for record in caplog.records]
    assert not any("XYZZY" in text for text in (answer.text, *lines))
    assert any("ValueError" in line and "test_told.py" in line for line in lines)


def test_the_description_names_every_setting(server):
    with server.client() as client:
        document = client.get("/openapi.json").json()
    asked = document["components"]["schemas"]["ChatRequest"]
    assert {"messages", "num_beams", "top_logprobs", "stream_options"} <= set(asked["properties"])
    assert asked["additionalProperties"] is True  # What asks for nothing is no error.


@pytest.mark.parametrize("is_stream", [False, True])
def test_who_leaves_is_told_as_such(server, caplog, is_stream):
    caplog.set_level(logging.INFO, logs.logger.name)
    server.wait_until_idle()
    body = {"model": NAME, "messages": [user("hi")]} | long_answer(stream=is_stream)
    headers = {"Content-Type": "application/json", "X-Request-Id": "leaves"}
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    wait_for(lambda: server.parts.admission.is_answering)
    connection.close()

    def outcomes():
        told = [getattr(record, "fields", {}) for record in caplog.records]
        return [each.get("outcome") for each in told if each.get("request_id") == "leaves"]

    wait_for(outcomes)
    assert outcomes() == ["cancelled"]
