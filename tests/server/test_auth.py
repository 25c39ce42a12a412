"""Keys guard every route but /health, and a public address needs them."""

import hmac

import openai
import pytest
from running import NAME, running, user

from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.server import auth

KEYS = ("first-key-of-many-letters", "second-key-of-many-letters")


@pytest.fixture(scope="module")
def guarded(model):
    with running(model, api_keys=KEYS) as server:
        yield server


@pytest.fixture(scope="module")
def own_names_only(model):
    with running(model, own_names_only=True) as server:
        yield server


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/ready"), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/openapi.json"),
     ("POST", "/v1/chat/completions"), ("GET", "/"), ("GET", "/nothing"), ("GET", "//health"),
     ("GET", "/health/../metrics"), ("OPTIONS", "/v1/models")],
)  # fmt: skip
def test_every_route_but_health_needs_a_key(guarded, method, path):
    with guarded.client() as client:
        assert client.get("/health").status_code == 200
        answer = client.request(method, path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(guarded, key):
    answer = guarded.openai(key).chat.completions.create(
        model=NAME, messages=[user("hi")], max_tokens=2
    )
    assert answer.choices


GUESSES = [
    b"", b"Bearer", KEYS[0].encode(), b"Basic " + KEYS[0].encode(), b"Bearer x",
    b"Bearer " + KEYS[0][:-1].encode(), b"Bearer " + KEYS[0].encode() + b"x",
    b"Bearer " + KEYS[0].upper().encode(), b"Bearer \xff\xfe", b"Bearer " + b"x" * 8000,
    b"Bearer " + " ".join(KEYS).encode(), b"Bearer # a comment",
]  # fmt: skip


@pytest.mark.parametrize("guess", GUESSES, ids=lambda guess: repr(guess[:20]))
def test_guessing(guarded, guess):
    with guarded.client() as client:
        answer = client.get("/v1/models", headers=[(b"Authorization", guess)])
    assert answer.status_code == 401


def test_two_keys_in_one_request_are_none(guarded):
    right = (b"Authorization", f"Bearer {KEYS[0]}".encode())
    with guarded.client() as client:
        assert client.get("/v1/models", headers=[right, right]).status_code == 401
        assert client.get("/v1/models", headers=[right]).status_code == 200


def test_the_client_s_own_error(guarded):
    with pytest.raises(openai.AuthenticationError):
        guarded.openai("wrong").models.list()


def test_all_keys_are_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr(
        hmac, "compare_digest", lambda one, other: compared.append((one, other)) or one == other
    )
    guard = auth.KeyGuard(lambda *_: None, KEYS)
    for key in (*KEYS, "wrong"):
        compared.clear()
        scope = {"headers": [(b"authorization", b"Bearer " + key.encode())]}
        assert guard._is_known(scope) == (key in KEYS)
        assert len(compared) == len(KEYS)
        assert {len(side) for pair in compared for side in pair} == {32}


def test_a_key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\n  {KEYS[0]}  \n{KEYS[1]}\n")
    assert auth.read_keys(path) == KEYS


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "holds no API key"), ("# none\n", "holds no API key"), ("short\n", "16 or more"),
     ("two words of many letters\n", "without blanks"), ("k\u00e9y" * 8, "ASCII")],
)  # fmt: skip
def test_a_key_file_that_will_not_do(tmp_path, content, words):
    path = tmp_path / "keys"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=words) as caught:
        auth.read_keys(path)
    assert not content.strip() or content.strip() not in str(caught.value)


def test_a_key_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        auth.read_keys(tmp_path / "none")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_a_public_address_needs_keys_or_a_word(host):
    with pytest.raises(ConfigError, match="--insecure"):
        auth.check_host(host, has_keys=False, is_insecure=False)
    auth.check_host(host, has_keys=True, is_insecure=False)
    auth.check_host(host, has_keys=False, is_insecure=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_s_own_address_needs_none(host):
    auth.check_host(host, has_keys=False, is_insecure=False)


OWN = ["localhost", "localhost:8000", "LOCALHOST", "a.localhost:1", "127.0.0.1:8000", "[::1]:8000",
       "192.168.1.5:8000"]  # fmt: skip
FOREIGN = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
           "[::", "a b", "@localhost.example", "localhost:x@evil"]  # fmt: skip


@pytest.mark.parametrize(("host", "status"), [(h, 200) for h in OWN] + [(h, 403) for h in FOREIGN])
def test_without_keys_no_site_can_pass_for_this_machine(own_names_only, host, status):
    with own_names_only.client() as client:
        for path in ("/v1/models", "/health", "/ready"):
            answer = client.get(path, headers={"Host": host})
            assert answer.status_code == status
        if status == 403:
            assert answer.json()["error"]["code"] == "unknown_host"
            assert "docs/serving.md" in answer.json()["error"]["message"]


def test_other_names_are_let_in_where_that_is_meant(server):
    with server.client() as client:
        assert client.get("/v1/models", headers={"Host": "pictures.example"}).status_code == 200


def test_cors_is_off_and_can_be_allowed(server, start):
    asking = {
        "Origin": "https://page.example", "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }  # fmt: skip
    with server.client() as client:
        assert "access-control-allow-origin" not in client.get("/health", headers=asking).headers
    with start(api_keys=KEYS, allowed_origins=("https://page.example",)).client() as client:
        answer = client.options("/v1/chat/completions", headers=asking)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        other = client.options("/v1/models", headers=asking | {"Origin": "https://o.example"})
        assert "access-control-allow-origin" not in other.headers
