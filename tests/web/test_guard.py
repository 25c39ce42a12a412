"""The page lets nobody read this machine's files, and no other site use it."""

import shutil

import httpx
import pytest
from page_server import KEY, PICTURES

pytestmark = pytest.mark.filterwarnings("default")

SETTINGS = [0, 1, 20, None]


@pytest.fixture(scope="module")
def client(serving):
    with httpx.Client(base_url=serving.url, timeout=30) as client:
        yield client


def ask_about(client, picture):
    """Ask as a script would; gives all that came back."""
    body = {"data": ["What is it?", picture, *SETTINGS]}
    event = client.post("/gradio_api/call/ask", json=body).json()["event_id"]
    return client.get(f"/gradio_api/call/ask/{event}").text


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
def test_only_what_was_uploaded_is_a_picture(client, tmp_path, meta):
    secret = tmp_path / "secret.png"
    shutil.copy(PICTURES / "one.png", secret)
    told = ask_about(client, {"path": str(secret), **meta})
    assert "event: error" in told
    assert "event: complete" not in told
    assert client.get(f"/gradio_api/file={secret}").status_code in (403, 404)


def test_an_uploaded_picture_is_asked_about(client):
    picture = (PICTURES / "one.png").read_bytes()
    (path,) = client.post("/gradio_api/upload", files={"files": ("a.png", picture)}).json()
    told = ask_about(client, {"path": path, "meta": {"_type": "gradio.FileData"}})
    assert "event: complete" in told


def test_other_sites_are_refused(client):
    for path in ("/", "/gradio_api/info", "/gradio_api/queue/join"):
        for host in (client.base_url.netloc.decode(), "pictures.example", "192.168.1.5:8123"):
            headers = {"Host": host, "Origin": "https://evil.example"}
            asked = {**headers, "Access-Control-Request-Method": "POST"}
            for answer in (client.get(path, headers=headers), client.options(path, headers=asked)):
                assert answer.status_code == 403
                assert not [name for name in answer.headers if name.startswith("access-control")]
    for origin in ("null", "http://[", "", "file://"):
        answer = client.get("/gradio_api/info", headers={"Origin": origin})
        assert answer.status_code == 403
    own = {"Host": "pictures.example", "Origin": "https://pictures.example"}
    assert client.get("/gradio_api/info", headers=own).status_code == 200
    assert "img-src 'self'" in client.get("/").headers["content-security-policy"]


def test_bodies_are_limited(client):
    large = b"x" * (2**20 + 1)
    assert client.post("/gradio_api/queue/join", content=large).status_code == 413

    def drip():
        yield from (large[:1000] for _ in range(1100))

    assert client.post("/gradio_api/queue/join", content=drip()).status_code == 413


def test_the_api_keeps_its_words_with_a_page_beside_it(client):
    for method, path, status in (
        ("GET", "/v1/foo", 404), ("GET", "/v1", 404), ("GET", "/v1/chat/completions", 405),
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
