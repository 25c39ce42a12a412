"""The page lets nobody read this machine's files, and no other site use it."""

import shutil

import httpx
import pytest
from page_server import KEY, PICTURES

pytestmark = pytest.mark.filterwarnings("default")

SETTINGS = ["", None, "", 0, 1, 0, 1, 1, 20, ""]  # Of them the first is the task.
SECRET = "grandmother"


@pytest.fixture(scope="module")
def client(serving):
    with httpx.Client(base_url=serving.url, timeout=30) as client:
        yield client


def call(client, number, data, session="a"):
    body = {"fn_index": number, "data": data, "session_hash": session}
    return client.post("/gradio_api/queue/join", json=body)


def number_of(client, name):
    """Which of the page's actions it is."""
    actions = client.get("/config").json()["dependencies"]
    return next(action["id"] for action in actions if action["api_name"] == name)


def ask_about(client, picture):
    """Ask as the page would; gives all that came back."""
    data = [None, None, {"text": "What is it?", "files": [picture]}, *SETTINGS]
    assert call(client, number_of(client, "ask"), data, "ask").status_code == 200
    return client.get("/gradio_api/queue/data", params={"session_hash": "ask"}).text


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
def test_only_what_was_uploaded_is_a_picture(client, tmp_path, meta):
    secret = tmp_path / "secret.png"
    shutil.copy(PICTURES / "one.png", secret)
    told = ask_about(client, {"path": str(secret), **meta})
    assert '"success":true' not in told
    assert '"success":false' in told
    assert client.get(f"/gradio_api/file={secret}").status_code in (403, 404)


@pytest.mark.parametrize("place", ["path", "url"])
def test_nothing_is_fetched_from_elsewhere(client, monkeypatch, place):
    asked = []

    async def resolve(host):
        asked.append(host)
        raise AssertionError(host)

    monkeypatch.setattr("safehttpx.async_validate_url", resolve)
    url = "http://pictures.example/a.png"
    assert client.get(f"/gradio_api/file={url}").status_code == 404
    file = {"path": "a", place: url, "meta": {"_type": "gradio.FileData"}}
    assert "pictures.example" not in ask_about(client, file)
    box = {"text": "", "files": [file]}
    call(client, number_of(client, "take_example"), [box])
    client.post("/gradio_api/run/predict", json={
        "fn_index": number_of(client, "take_example"), "data": [box], "session_hash": "b",
    })  # fmt: skip
    data = [None, None, file, *SETTINGS]
    assert call(client, number_of(client, "ask"), data, "c").status_code == 200
    told = client.get("/gradio_api/queue/data", params={"session_hash": "c"}).text
    assert '"success"' in told
    assert asked == []


def test_a_page_finds_out_that_its_server_is_back(client):
    identity = client.get("/config").json()["app_id"]
    assert client.get("/gradio_api/app_id").json() == {"app_id": identity}


def test_an_uploaded_picture_is_asked_about(client):
    picture = (PICTURES / "one.png").read_bytes()
    (path,) = client.post("/gradio_api/upload", files={"files": ("a.png", picture)}).json()
    told = ask_about(client, {"path": path, "meta": {"_type": "gradio.FileData"}})
    assert '"success":true' in told


def test_other_sites_are_refused(client):
    for path in ("/", "/config", "/gradio_api/queue/join"):
        for host in (client.base_url.netloc.decode(), "pictures.example", "192.168.1.5:8123"):
            headers = {"Host": host, "Origin": "https://evil.example"}
            asked = {**headers, "Access-Control-Request-Method": "POST"}
            for answer in (client.get(path, headers=headers), client.options(path, headers=asked)):
                assert answer.status_code == 403
                assert not [name for name in answer.headers if name.startswith("access-control")]
    for origin in ("null", "http://[", "", "file://"):
        answer = client.get("/config", headers={"Origin": origin})
        assert answer.status_code == 403
    own = {"Host": "pictures.example", "Origin": "https://pictures.example"}
    assert client.get("/config", headers=own).status_code == 200
    assert "img-src 'self'" in client.get("/").headers["content-security-policy"]


def test_bodies_are_limited(client):
    large = b"x" * (2**20 + 1)
    assert client.post("/gradio_api/queue/join", content=large).status_code == 413

    def drip():
        yield from (large[:1000] for _ in range(1100))

    assert client.post("/gradio_api/queue/join", content=drip()).status_code == 413


def test_only_what_the_page_asks_for_is_there(client):
    for path in ("info", "runs", "call/ask", "run-history/records", "startup-events", "token"):
        for method in ("GET", "POST"):
            assert client.request(method, f"/gradio_api/{path}").status_code == 404
    assert client.get("/monitoring").status_code == 404
    assert client.get("/nothing").text == "There is nothing here. The chat page is at /."
    assert client.get("/config").json()["run_history"] is False


def odd_calls(client):
    """Requests that no page makes; each holds the word that must not be written down."""
    actions = client.get("/config").json()["dependencies"]
    numbers = [-1, 99999, 1e30, *(action["id"] for action in actions)]
    file = {"path": f"/{SECRET}", "meta": {"_type": "gradio.FileData"}}
    for number in numbers:
        for data in ([], [SECRET], [None] * 8, [file] * 8, [[SECRET]] * 8, [SECRET] * 20):
            yield "queue/join", {"fn_index": number, "data": data, "session_hash": "odd"}
            yield "run/predict", {"fn_index": number, "data": data}
    for path in ("queue/join", "run/predict", "run/nothing", "cancel", "reset"):
        yield path, {"data": [SECRET]}
        yield path, {"fn_index": 1, "event_id": SECRET, "session_hash": SECRET, "data": SECRET}
        yield path, [SECRET]


def test_odd_calls_are_refused_and_not_written_down(client, serving, capfd):
    capfd.readouterr()
    for path, body in odd_calls(client):
        answer = client.post(f"/gradio_api/{path}", json=body)
        assert answer.status_code in (200, 400, 404, 422), (path, body, answer.text)
    raw = {"Content-Type": "application/json"}
    lone = b'{"fn_index": 0, "event_id": "a", "session_hash": "\\ud800", "data": []}'
    for content in (b"", b"{", b"[" * 100_000, lone, lone.replace(b" 0", b" 1e400"), b"\xff"):
        for path in ("queue/join", "run/predict", "cancel", "reset"):
            answer = client.post(f"/gradio_api/{path}", content=content, headers=raw)
            assert answer.status_code in (200, 400, 404, 422), (path, content)
    for name, content in (("", b""), ("../../a", b"a"), ("." * 3000, b"a"), ("\0", b"a")):
        answer = client.post("/gradio_api/upload", files={"files": (name, content)})
        assert answer.status_code in (200, 400, 422), (name, answer.text)
    assert client.get("/assets/" + "a" * 5000).status_code == 422
    told = client.get("/gradio_api/queue/data", params={"session_hash": "odd"}).text
    assert told.count('"success":false') > 20
    assert any(SECRET in str(error) for error in serving.failures)
    assert capfd.readouterr() == ("", "")


def test_the_api_keeps_its_words_with_a_page_beside_it(client):
    for method, path, status in (
        ("POST", "/chat/completions", 404), ("GET", "/v1/foo", 404), ("GET", "/v1", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405), ("DELETE", "/ready", 405), ("POST", "/health", 405),
    ):  # fmt: skip
        answer = client.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert "GET" in client.post("/health").headers["allow"]
    assert client.head("/health").status_code == client.head("/ready").status_code == 200


def test_the_page_is_behind_the_keys(guarded):
    assert httpx.get(guarded.url).status_code == 401
    assert httpx.get(guarded.url, auth=("x", KEY)).status_code == 200
