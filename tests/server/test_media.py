"""Where pictures come from, and how nothing else is reached through them."""

import asyncio
import ipaddress
import socket

import pytest
from picture_site import Site
from running import IMAGES, data_url, picture, user

from minigpt4_runtime.errors import ImageError
from minigpt4_runtime.images import fetch as image_fetch
from minigpt4_runtime.images.fetch import Target, is_public
from minigpt4_runtime.server.media import MediaPolicy

PNG = (IMAGES / "three.png").read_bytes()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"


def open_url(url, **policy):
    return asyncio.run(MediaPolicy(**policy).open(url)).value


@pytest.fixture
def site(monkeypatch):
    """Makes sites; this machine counts as public, and their name leads to it."""
    sites = []

    async def resolve(self, host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", resolve)
    monkeypatch.setattr(image_fetch, "is_public", lambda address: address == "127.0.0.1")

    def make(answer, **settings):
        sites.append(Site(answer, **settings))
        return sites[-1]

    yield make
    for each in sites:
        each.close()


def fetch(site, path="/a.png", **policy):
    settings = {"domains": frozenset({site.name}), "seconds": 5} | policy
    return open_url(f"http://{site.name}{path}", **settings)


# --- what is allowed ----------------------------------------------------------------------------


def test_data_urls_always():
    assert open_url(data_url()) == data_url()


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + b"Content-Length: %d\r\n\r\n" % len(PNG) + PNG,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(PNG) + PNG + b"\r\n0\r\n\r\n",
        HEAD + b"\r\n" + PNG,
        b"HTTP/1.0 200 OK\r\ncontent-type: IMAGE/PNG; q=1\r\n\r\n" + PNG,
        b"HTTP/1.1 200 OK\r\nContent-Type: image/avif\r\n\r\n" + PNG,
    ],
    ids=["length", "chunks", "until closed", "HTTP/1.0", "another type"],
)
def test_a_picture_is_fetched(site, answer):
    there = site(answer)
    assert fetch(there, "/a b.png?x=\u00e9&y=%20") == PNG
    question = there.asked[0].decode().lower()
    assert question.startswith("get /a%20b.png?x=%c3%a9&y=%20 http/1.1\r\n")
    assert f"host: {there.name}\r\n" in question
    assert "authorization" not in question
    assert "cookie" not in question


def test_a_fetched_picture_is_answered(site, start):
    there = site(HEAD + b"\r\n" + PNG)
    with_site = start(media_domains=(there.name,))
    fetched = with_site.ask(messages=[user([picture(f"http://{there.name}/a.png")])])
    sent = with_site.ask(messages=[user([picture()])])
    assert fetched.json()["choices"] == sent.json()["choices"]


def test_files_in_the_folder(tmp_path):
    (tmp_path / "a b.png").write_bytes(PNG)
    url = (tmp_path / "a b.png").as_uri()
    assert open_url(url, folder=tmp_path) == PNG
    assert open_url(url.replace("file://", "FILE://localhost"), folder=tmp_path) == PNG
    with pytest.raises(ImageError, match="more than 5 bytes"):
        open_url(url, folder=tmp_path, max_bytes=5)


def test_a_file_is_answered(server):
    answer = server.ask(messages=[user([picture((IMAGES / "three.png").as_uri())])])
    assert answer.status_code == 200, answer.text


# --- what is not --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["", "a.png", "/etc/passwd", "~/a.png", "ftp://x/a.png", "gopher://x", "javascript:1", "blob:x",
     "HTTPX://x", "http", "\x00", "ht\ntp://x/", " http://x/"],
)  # fmt: skip
def test_other_schemes_and_plain_paths_are_refused(url):
    with pytest.raises(ImageError, match="begins with data:"):
        open_url(url, folder=IMAGES)


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "{dir}/../secret.png", "{dir}/%2e%2e/secret.png", "{dir}/link.png", "{dir}",
     "{dir}/none.png", "{dir}/a%00.png", "{dir}x/a.png", "secret.png", "//other{dir}/a.png",
     "{dir}/%ff.png", "{dir}/loop", "{dir}/" + "a" * 300, "{dir}/" + "a/" * 5000],
)  # fmt: skip
def test_files_elsewhere_are_refused_alike(tmp_path, path):
    folder = tmp_path / "pictures"
    for each in (folder, tmp_path / "picturesx"):
        each.mkdir()
        (each / "a.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(ImageError, match=r"^This server opens no such file\."):
        open_url("file:" + path.format(dir=folder), folder=folder)


def test_no_file_without_a_folder():
    with pytest.raises(ImageError, match="no such file"):
        open_url((IMAGES / "three.png").as_uri())


@pytest.mark.parametrize(
    "url",
    ["http://other.example/", "http://pictures.example.other.example/", "http://pictures.example:81/",
     "http://pictures.example./", "http://127.0.0.1/", "http://[::1]/", "http://2130706433/",
     "http://0x7f.1/", "https://pictures.example:80/", "http://localhost/",
     "http://169.254.169.254/latest/meta-data/"],
)  # fmt: skip
def test_only_the_named_hosts(url):
    with pytest.raises(ImageError, match="fetches no pictures from"):
        open_url(url, domains=frozenset({"pictures.example"}))


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///a", "http://u@pictures.example/", "http://pictures.example@127.0.0.1/",
     "http://pictures.example\\@127.0.0.1/", "http://p\u00edctures.example/", "http://[::1/",
     "http://pictures.example:99999/", "http://pictures.example:x/"],
)  # fmt: skip
def test_ambiguous_urls_are_refused(url):
    with pytest.raises(ImageError, match="not a usable http"):
        open_url(url, domains=frozenset({"pictures.example"}))


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1",
     "169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.192", "168.63.129.16",
     "224.0.0.1", "255.255.255.255", "240.0.0.1", "198.18.0.1", "::", "::1", "fe80::1",
     "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1",
     "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
     "2002:7f00:1::", "2002:a00:1::1", "2001:db8::1", "::127.0.0.1", "64:ff9b:1::1",
     "nonsense"],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "64:ff9b::101:101"]
)
def test_addresses_that_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["1.1.1.1", "10.0.0.1"], ["::ffff:169.254.169.254"], []]
)
def test_every_address_of_a_name_must_be_public(monkeypatch, addresses):
    async def resolve(self, host, port, **_):
        return [(0, 0, 0, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", resolve)
    with pytest.raises(ImageError, match="not public"):
        open_url("http://pictures.example/a.png", domains=frozenset({"pictures.example"}))


def test_a_name_is_resolved_once_and_the_connection_goes_to_what_was_checked(monkeypatch):
    """A name that leads elsewhere at its second asking (DNS rebinding) gains nothing."""
    resolved, connected = [], []

    async def resolve(self, host, port, **_):
        resolved.append(host)
        return [(0, 0, 0, "", ("1.1.1.1" if len(resolved) == 1 else "127.0.0.1", port))]

    async def connect(host, port, **settings):
        connected.append((host, port, settings["server_hostname"], settings["ssl"] is not None))
        raise OSError(111, "refused")

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", resolve)
    monkeypatch.setattr(asyncio, "open_connection", connect)
    for scheme in ("http", "https"):
        resolved.clear()
        with pytest.raises(ImageError, match="connection failed: refused"):
            open_url(f"{scheme}://Pictures.Example/", domains=frozenset({"pictures.example"}))
        assert resolved == ["pictures.example"]
    assert connected == [
        ("1.1.1.1", 80, None, False), ("1.1.1.1", 443, "pictures.example", True),
    ]  # fmt: skip
    assert ipaddress.ip_address(connected[0][0]).is_global


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n", "redirects are not"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "the status is 404"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>", "content type"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: image/svg+xml\r\n\r\n<svg>", "content type"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + PNG, "content type"),
        (HEAD + b"Content-Length: 999999999\r\n\r\n", "more than 50,000 bytes"),
        (HEAD + b"\r\n" + b"x" * 60_000, "more than 50,000 bytes"),
        (HEAD + b"Content-Length: 900\r\n\r\nshort", "not HTTP"),
        (b"SSH-2.0-OpenSSH_9\r\n", "not HTTP"),
        (b"", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, "not HTTP"),
    ],
    ids=lambda value: repr(value[:24]),
)  # fmt: skip
def test_what_a_site_may_answer(site, answer, reason):
    there = site(answer)
    with pytest.raises(ImageError, match=reason):
        fetch(there, max_bytes=50_000)
    assert len(there.asked) == 1


def test_a_slow_site_is_given_up(site):
    there = site(HEAD + b"Content-Length: 900\r\n\r\nsome", stays_open=True)
    with pytest.raises(ImageError, match=r"longer than 0\.2 seconds"):
        fetch(there, seconds=0.2)


def test_a_refused_url_is_a_400_that_says_so(server):
    for url in ("http://169.254.169.254/latest", "file:///etc/passwd", "/etc/passwd"):
        answer = server.ask(messages=[user([picture(url)])])
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "invalid_image"


def test_target_names_the_port_only_where_it_is_another():
    assert Target.read("https://A.example/x").name == "a.example"
    assert Target.read("http://a.example:8080").name == "a.example:8080"
    assert Target.read("http://[2606::1]:8080/").name == "[2606::1]:8080"
