"""One file from hosts that redirect, ask, limit, cut, lie and refuse."""

import errno
import hashlib
import http.server
import json
import re
import sys
import threading
from dataclasses import replace

import pytest
from published_web import BUCKET, DRIVE_IDS, TOKEN, Mishap

from minigpt4_runtime.checkpoint.sources import SourceFile
from minigpt4_runtime.errors import BackendUnavailableError, CheckpointError, ConfigError
from minigpt4_runtime.hub import download as room
from minigpt4_runtime.hub.download import Stopped, Watch, download
from minigpt4_runtime.hub.download_record import DownloadRecord
from minigpt4_runtime.hub.hosts import find_address, open_client

pytestmark = pytest.mark.usefixtures("cache_home")

TOWER = "eva_vit_g.pth"
SHARD = "pytorch_model-00001-of-00004.bin"
PROJECTION = "pretrained_minigpt4_7b.pth"
PAGE = b"<!DOCTYPE html><html><head><title>Quota exceeded</title></head></html>"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(room, "FIRST_WAIT_SECONDS", 0.0)


def bucket(web, name=TOWER, **known):
    return SourceFile(name, (f"{web.site}{BUCKET}/{name}",), **known)


def hub(name=SHARD, **known):
    return SourceFile(name, (f"hub:Vision-CAIR/vicuna-7b/{name}",), **known)


def drive(web, name=PROJECTION):
    return SourceFile(name, (f"{web.site}/uc?export=download&id={DRIVE_IDS[name]}",))


@pytest.fixture
def bring(web, cache_home):
    """Downloads a file as a new process would; gives its arrival, and checks what lies there."""
    cache_home.mkdir()

    def bring_file(file, on_bytes=lambda _: None, stop=None, say=lambda _: None):
        target = cache_home / file.name
        watch = Watch(on_bytes, say, stop or threading.Event())
        with open_client() as client:
            arrival = download(
                file, target, client=client, downloads=DownloadRecord(cache_home), watch=watch
            )
        content = target.read_bytes()
        assert arrival.sha256 == hashlib.sha256(content).hexdigest()
        assert sorted(path.name for path in cache_home.iterdir()) == sorted(
            {file.name, "downloads.json"}
        )
        return content

    return bring_file


def refuse(bring, file, cache_home):
    """The message of a failed download, which left nothing under the file's name."""
    with pytest.raises(CheckpointError) as failure:
        bring(file)
    assert not (cache_home / file.name).exists()
    message = str(failure.value)
    assert file.name in message
    assert "By hand: download it from" in message
    assert "--from DIR" in message
    return message


def test_a_plain_server(web, bring):
    assert bring(bucket(web)) == web.files[TOWER]


def test_the_hub_sends_on_to_its_store_without_the_token(web, bring, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert bring(hub()) == web.files[SHARD]
    assert web.requests_for(SHARD, "site")[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert "authorization" not in web.requests_for(SHARD, "store")[0].headers


def test_a_revision_and_a_space_are_part_of_the_address(web, bring):
    bring(SourceFile(SHARD, (f"hub:spaces/Vision-CAIR/minigpt4@c0ffee/{SHARD}",)))
    path = web.requests_for(SHARD, "site")[0].path
    assert path == f"/spaces/Vision-CAIR/minigpt4/resolve/c0ffee/{SHARD}"


@pytest.mark.parametrize("scans", [True, False])
def test_drive_asks_whether_the_file_may_come_unscanned(web, bring, scans):
    web.scans = scans
    assert bring(drive(web)) == web.files[PROJECTION]


@pytest.mark.parametrize(
    "link",
    ["file/d/{}/view", "file/d/{}/view?usp=sharing", "open?id={}", "uc?id={}",
     "uc?export=download&id={}", "file/d/{}"],
)  # fmt: skip
def test_any_link_to_a_file_on_drive_will_do(link):
    place = f"https://drive.google.com/{link.format('1RY9jV0dyqLX-o38')}"
    address = find_address(place)
    assert address.url == "https://drive.google.com/uc?export=download&id=1RY9jV0dyqLX-o38"
    assert address.page == place


def test_what_drive_says_of_a_failure_is_passed_on(web, bring, cache_home):
    page = (
        "<html><head><title>Google Drive - Quota exceeded</title></head><body>"
        '<p class="uc-error-caption">Sorry, you can\'t view or download this file.</p>'
        '<p class="uc-error-subcaption">Too many users have viewed it recently.</p></body></html>'
    )
    headers = {"Content-Type": "text/html; charset=utf-8"}
    web.mishaps[PROJECTION] = [Mishap(content=page.encode(), headers=headers)]
    web.scans = False
    message = refuse(bring, drive(web), cache_home)
    assert "Google Drive - Quota exceeded. Sorry, you can't" in message
    assert "Too many users have viewed it recently." in message


@pytest.mark.parametrize("where", ["bucket", "hub"])
def test_a_cut_file_goes_on_where_it_stopped(web, bring, where):
    file = bucket(web) if where == "bucket" else hub()
    content = web.files[file.name]
    web.mishaps[file.name] = [Mishap(cut_after=len(content) // 2)]
    counted = []
    assert bring(file, counted.append) == content
    assert sum(counted) == len(content)
    ranges = [each.headers.get("range") for each in web.requests_for(file.name)]
    # The last byte comes again: an empty range would be an error.
    assert ranges[-1] == f"bytes={len(content) // 2 - 1}-"


def test_a_stopped_download_goes_on_in_another_process(web, bring, cache_home):
    file, stop = bucket(web), threading.Event()
    web.mishaps[TOWER] = [Mishap(cut_after=1000)]

    def stop_at_once(num_bytes):
        stop.set()

    with pytest.raises(Stopped):
        bring(file, stop_at_once, stop)
    assert not (cache_home / TOWER).exists()
    kept = (cache_home / f"{TOWER}.partial").stat().st_size
    assert kept > 0
    web.mishaps.clear()
    assert bring(file) == web.files[TOWER]
    assert web.seen[-1].headers["range"] == f"bytes={kept - 1}-"


def test_all_bytes_without_the_name_are_checked_again(web, bring, cache_home):
    """Killed between the last byte and the renaming."""
    etag = f'"{hashlib.md5(web.files[TOWER]).hexdigest()}"'
    note = {"url": bucket(web).hosts[0], "validator": etag}
    (cache_home / f"{TOWER}.partial").write_bytes(web.files[TOWER])
    (cache_home / f"{TOWER}.note.partial").write_text(json.dumps(note))
    assert bring(bucket(web)) == web.files[TOWER]
    assert web.seen[-1].headers["if-range"] == etag


def test_killed_before_the_renaming_a_file_is_not_downloaded_again(
    web, bring, cache_home, monkeypatch
):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(room.Path, "replace", lambda path, to: die() if to.name == TOWER else None)
        with pytest.raises(KeyboardInterrupt):
            bring(bucket(web))
    num_before = len(web.requests_for(TOWER))
    assert bring(bucket(web)) == web.files[TOWER]
    (again,) = web.requests_for(TOWER)[num_before:]
    assert again.headers["range"] == f"bytes={len(web.files[TOWER]) - 1}-"


def test_old_bytes_are_not_mixed_with_a_replaced_file(web, bring):
    content = web.files[TOWER]
    older = content[:4] + bytes(reversed(content[4:]))
    web.mishaps[TOWER] = [Mishap(content=older, cut_after=1000)]
    assert bring(bucket(web)) == content
    assert web.seen[-1].headers["if-range"] == f'"{hashlib.md5(older).hexdigest()}"'


@pytest.mark.parametrize("tells", ["another tag", "another size"])
def test_a_host_that_goes_on_with_another_file_is_noticed(web, bring, tells):
    """It has tags, and does not look at what If-Range asks."""
    web.ignores_if_range = True
    content = web.files[TOWER]
    older = content[:4] + bytes(reversed(content[4:]))
    if tells == "another tag":
        web.mishaps[TOWER] = [Mishap(content=older, cut_after=1000)]
    else:
        tag = {"ETag": '"always the same"'}
        web.mishaps[TOWER] = [
            Mishap(content=older + b"more", cut_after=1000, headers=tag), Mishap(headers=tag),
        ]  # fmt: skip
    assert bring(SourceFile(TOWER, (f"{web.site}/no digest here/{TOWER}",))) == content
    assert [each.headers.get("range") for each in web.seen] == [None, "bytes=999-", None]


def test_without_an_etag_a_cut_file_begins_anew(web, bring):
    web.mishaps[PROJECTION] = [Mishap(cut_after=5000)]
    assert bring(drive(web)) == web.files[PROJECTION]
    assert not any("range" in each.headers for each in web.seen)


def test_a_known_digest_takes_the_place_of_an_etag(web, bring):
    """And where the digest then differs, the file is not taken, but asked for from its start."""
    content = web.files[TOWER]
    web.has_etags = False
    file = bucket(web, sha256=hashlib.sha256(content).hexdigest())
    older = content[:4] + bytes(reversed(content[4:]))
    web.mishaps[TOWER] = [Mishap(content=older, cut_after=1000)]
    assert bring(file) == content
    ranges = [each.headers.get("range") for each in web.seen]
    assert ranges == [None, "bytes=999-", None]


def test_a_digest_that_the_hub_tells_does_so_too(web, bring):
    web.has_etags = False
    web.mishaps[SHARD] = [Mishap(cut_after=100_000)]
    assert bring(hub()) == web.files[SHARD]
    assert web.seen[-1].headers["range"] == "bytes=99999-"


def test_a_password_in_an_address_is_not_shown(web, bring, cache_home):
    place = f"http://me:secret@{web.site[7:]}/gone"
    message = refuse(bring, SourceFile(TOWER, (place,)), cache_home)
    assert web.site in message
    assert "secret" not in message


def test_neither_is_one_in_the_address_of_a_mirror(web, bring, cache_home, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://me:sec@ret@{web.site[7:]}")
    web.gated.add("Vision-CAIR/vicuna-7b")
    message = refuse(bring, hub(), cache_home)
    assert f"Accept the licence at {web.site}/Vision-CAIR/vicuna-7b" in message
    assert f"download it from {web.site}/Vision-CAIR/vicuna-7b/resolve/main/{SHARD}" in message
    assert "ret@" not in message


def test_a_server_that_knows_no_ranges_gives_the_file_anew(web, bring):
    web.ignores_ranges = True
    web.mishaps[TOWER] = [Mishap(cut_after=1000)]
    assert bring(bucket(web)) == web.files[TOWER]


def test_a_shorter_file_than_what_is_here_begins_anew(web, bring, cache_home):
    file = bucket(web, sha256=hashlib.sha256(web.files[TOWER]).hexdigest())
    (cache_home / f"{TOWER}.partial").write_bytes(bytes(len(web.files[TOWER]) + 10))
    assert bring(file) == web.files[TOWER]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_host_is_asked_again_when_it_says(web, bring, status):
    web.mishaps[TOWER] = [Mishap(status=status, headers={"Retry-After": "0"})] * 3
    said = []
    assert bring(bucket(web), say=said.append) == web.files[TOWER]
    assert len(web.seen) == 4
    assert len(said) == 3
    assert f"{TOWER}, {web.site[7:]}: it answered {status}" in said[0]


def test_patience_ends(web, bring, cache_home):
    web.mishaps[TOWER] = [Mishap(status=503)] * 9
    message = refuse(bring, bucket(web), cache_home)
    assert "it answered 503 Service Unavailable, 5 times in a row" in message
    assert len(web.seen) == room.MAX_HICCUPS


def test_a_host_that_asks_for_hours_is_not_waited_for(web, bring, cache_home):
    web.mishaps[TOWER] = [Mishap(status=429, headers={"Retry-After": "7200"})]
    assert "asks to wait 7200 seconds" in refuse(bring, bucket(web), cache_home)
    assert len(web.seen) == 1


def test_a_date_to_come_back_at(web, bring):
    past = {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}
    web.mishaps[TOWER] = [Mishap(status=429, headers=past)]
    assert bring(bucket(web)) == web.files[TOWER]


def test_nobody_at_the_address(web, bring, cache_home):
    file = SourceFile(TOWER, ("http://127.0.0.1:9/eva_vit_g.pth",))
    message = refuse(bring, file, cache_home)
    assert "127.0.0.1:9: the connection broke" in message


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/octet-stream"}])
def test_a_web_page_is_refused_at_once(web, bring, cache_home, headers):
    """Whether the server owns up to it or not."""
    web.mishaps[TOWER] = [Mishap(page=PAGE, headers=headers)]
    message = refuse(bring, bucket(web), cache_home)
    assert f"{web.site[7:]}: it gave a web page in place of the file (Quota exceeded)" in message
    assert len(web.seen) == 1
    assert not list(cache_home.glob("*.partial"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"too many requests from your address\n", "it gave a text in place of the file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        (b"", "its file is empty"),
        ('{"error": "请求过于频繁，请稍后再试"}'.encode(), "it gave a text in place of the file"),
        (('{"error": "' + "请求过于频繁" * 1000 + '"}').encode(), "it gave a text"),
        (bytes(range(1, 200)), "its file begins with 01 02 03 04 05 06 07 08, as no .pth does"),
    ],
)
def test_other_stand_ins(web, bring, cache_home, content, words):
    web.files[TOWER] = content
    assert words in refuse(bring, bucket(web), cache_home)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.model", b"\x00\x01\x02\x03", "its file begins with 00 01 02 03"),
        ("config.json", b"[1, 2]", "it gave a text in place of the file"),
        ("config.json", b'{"hidden_size": 40', "its file of 18 bytes is not valid JSON"),
    ],
)
def test_small_files_are_looked_at_too(web, bring, cache_home, name, content, words):
    """What was refused is no first arrival: the right file comes the next time."""
    right = web.files[name]
    web.files[name] = content
    assert words in refuse(bring, bucket(web, name), cache_home)
    web.files[name] = right
    assert bring(bucket(web, name)) == right


@pytest.mark.parametrize(
    ("page", "title"),
    [
        (b"<html><title>A form</title><form id='download-form'></form>", "A form"),
        (b"<html><form id='download-form' action='/x'><input type='hidden'></form>", "without"),
        (b"<html><form id='download-form' action='http://[::1'></form>", "without a title"),
        (b"<html><title>Cut</title><![odd[ <p>", "Cut"),
    ],
)
def test_pages_that_nobody_understands(web, bring, cache_home, page, title):
    web.mishaps[TOWER] = [Mishap(page=page)]
    assert f"in place of the file ({title}" in refuse(bring, bucket(web), cache_home)


def test_a_page_of_the_hub_gets_no_token_for_another_address(web, bring, cache_home, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    page = f"<html><form id='download-form' action='{web.store}/{TOWER}'></form></html>"
    web.files["config.json"] = b"{}"
    web.mishaps["config.json"] = [Mishap(page=page.encode())]
    assert "it gave a web page" in refuse(bring, hub("config.json"), cache_home)
    assert {each.origin for each in web.seen} == {"site"}


def test_headers_that_make_no_sense_are_passed_over(web, bring):
    odd = {"x-goog-hash": "md5=!!!x", "X-Linked-Size": "many"}
    busy = {"Retry-After": "\u00b2"}
    web.mishaps[TOWER] = [Mishap(status=429, headers=busy), Mishap(headers=odd)]
    assert bring(bucket(web)) == web.files[TOWER]


def test_a_host_must_say_how_long_a_file_is(web, bring, cache_home):
    """Else its end and a cut are the same."""
    web.mishaps[TOWER] = [Mishap(headers={"Content-Length": None}, cut_after=5000)]
    assert "it does not say how long its file is" in refuse(bring, bucket(web), cache_home)


def test_a_host_that_does_not_end_is_left(web, bring, cache_home):
    """In pieces, without a length."""
    chunked = {"Content-Length": None, "Transfer-Encoding": "chunked"}
    content = b"PK\x03\x04" + bytes(9996)
    body = b"2710\r\n" + content + b"\r\n"
    web.mishaps[TOWER] = [Mishap(content=body * 50, headers=chunked, cut_after=10_006 * 49)]
    message = refuse(bring, bucket(web, size=15_000), cache_home)
    assert "its file has more than the published 15000 bytes" in message
    assert len(web.seen) == 1


def test_a_file_that_is_packed_on_its_way_is_refused(web, bring, cache_home):
    web.mishaps[TOWER] = [Mishap(headers={"Content-Encoding": "gzip"})]
    assert "it packs the file on its way (gzip)" in refuse(bring, bucket(web), cache_home)


def test_a_dead_link(web, bring, cache_home):
    del web.files[TOWER], web.files[SHARD]
    assert "it answered 404 Not Found" in refuse(bring, bucket(web), cache_home)
    assert "it answered 404 Not Found" in refuse(bring, hub(), cache_home)


def test_a_gate_says_what_to_do(web, bring, cache_home, monkeypatch):
    web.gated.add("Vision-CAIR/vicuna-7b")
    message = refuse(bring, hub(), cache_home)
    assert "it answered 401 Unauthorized (Access to model" in message
    assert f"Accept the licence at {web.site}/Vision-CAIR/vicuna-7b" in message
    assert "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "hf_of_someone_else")
    message = refuse(bring, hub(), cache_home)
    assert "it answered 403 Forbidden" in message
    assert "once you have accepted the licence" in message
    assert "hf_of_someone_else" not in message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert bring(hub()) == web.files[SHARD]


def test_a_token_that_is_not_valid_is_called_so(web, monkeypatch, bring, cache_home):
    web.mishaps[SHARD] = [Mishap(status=401), Mishap(status=401)]
    address = replace(find_address(hub().hosts[0]), url=f"{web.site}{BUCKET}/{SHARD}")
    monkeypatch.setattr(room, "find_address", lambda _: address)
    message = refuse(bring, hub(), cache_home)
    assert "it answered 401 Unauthorized: it wants to know who asks" in message
    sent = replace(address, headers={"Authorization": "Bearer hf_of_old"})
    monkeypatch.setattr(room, "find_address", lambda _: sent)
    message = refuse(bring, hub(), cache_home)
    assert "it answered 401 Unauthorized: your token is not valid, or has expired" in message
    assert "licence" not in message


def test_an_endpoint_that_is_empty_or_no_address(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert find_address("hub:a/b/c").url == "https://huggingface.co/a/b/resolve/main/c"
    for endpoint in ("hf-mirror.com", "https://hf-mirror.com ", "http://[::1", "http://h:port"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(ConfigError, match=rf"HF_ENDPOINT is '{re.escape(endpoint)}'; it must"):
            find_address("hub:a/b/c")


def test_a_socks_proxy_needs_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    with pytest.raises(BackendUnavailableError, match=r"ALL_PROXY names a SOCKS proxy.*\[socks\]"):
        open_client()


@pytest.mark.parametrize("proxy", ["ftp://127.0.0.1:1", "http://a:b:c"])
def test_a_proxy_that_is_none(monkeypatch, proxy):
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(ConfigError, match="A proxy that the environment names cannot be used"):
        open_client()


def test_a_repository_that_is_gone(web, bring, cache_home):
    web.gone.add("Vision-CAIR/vicuna-7b")
    message = refuse(bring, hub(), cache_home)
    assert "there is no such repository, or it is private" in message
    assert "licence" not in message


def test_a_known_size_that_differs_is_refused_before_the_bytes(web, bring, cache_home):
    message = refuse(bring, bucket(web, size=123), cache_home)
    assert f"its file has {len(web.files[TOWER])} bytes, and the published one 123" in message
    assert not list(cache_home.glob("*.partial"))


def test_a_known_digest_that_differs(web, bring, cache_home):
    message = refuse(bring, bucket(web, sha256="0" * 64), cache_home)
    assert f"and the published one {'0' * 64}" in message
    assert not list(cache_home.glob("*.partial"))


def test_the_hub_itself_is_held_to_the_digest_that_it_tells(web, bring, cache_home):
    damaged = b"PK\x03\x04" + bytes(len(web.files[SHARD]) - 4)
    web.mishaps[SHARD] = [Mishap(content=damaged)]
    assert "and not the one that it gives" in refuse(bring, hub(), cache_home)


def test_a_bucket_is_held_to_its_md5(web, bring):
    """A damaged transfer is worth another try."""
    wrong = {"x-goog-hash": "md5=AAAAAAAAAAAAAAAAAAAAAA=="}
    web.mishaps[TOWER] = [Mishap(headers=wrong)]
    assert bring(bucket(web)) == web.files[TOWER]
    assert len(web.seen) == 2


def test_the_first_arrival_is_trusted_and_later_ones_compared(web, bring, cache_home):
    file = drive(web)
    first = bring(file)
    (cache_home / file.name).unlink()
    assert bring(file) == first
    (cache_home / file.name).unlink()
    web.files[PROJECTION] = first + b"more"
    message = refuse(bring, file, cache_home)
    assert f"had {hashlib.sha256(first).hexdigest()}" in message
    assert str(cache_home / "downloads.json") in message
    # Whoever knows better says so in a table of their own.
    known = replace(file, sha256=hashlib.sha256(web.files[PROJECTION]).hexdigest())
    assert bring(known) == web.files[PROJECTION]


def test_the_next_host_is_asked(web, bring, cache_home):
    dead = f"{web.site}/gone/{TOWER}.gone"
    file = SourceFile(TOWER, (dead, f"{web.site}{BUCKET}/{TOWER}"))
    assert bring(file) == web.files[TOWER]
    # It is known under its first place, whoever gave it.
    assert list(json.loads((cache_home / "downloads.json").read_text())) == [dead]


def test_all_hosts_are_named_when_none_gives_it(web, bring, cache_home):
    file = SourceFile(TOWER, (f"{web.site}/a/gone", "hub:Vision-CAIR/vicuna-7b/gone"))
    message = refuse(bring, file, cache_home)
    assert message.count("it answered 404 Not Found") == 2
    assert f"{web.site}/a/gone or {web.site}/Vision-CAIR/vicuna-7b/resolve/main/gone" in message


def test_a_full_disk_keeps_what_came(web, bring, cache_home, monkeypatch):
    write = room._Attempts._write

    def write_until_full(attempts, content, reply, digests):
        if reply.start:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(attempts, content, reply, digests)

    web.mishaps[TOWER] = [Mishap(cut_after=1000)]
    with monkeypatch.context() as patched:
        patched.setattr(room._Attempts, "_write", write_until_full)
        with pytest.raises(CheckpointError, match=r"is full.* goes on from there"):
            bring(bucket(web))
    assert (cache_home / f"{TOWER}.partial").stat().st_size == 999
    assert bring(bucket(web)) == web.files[TOWER]
    assert web.seen[-1].headers["range"] == "bytes=998-"


def test_a_proxy_is_honoured(web, bring, monkeypatch):
    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            asked.append(self.path)
            content = web.files[TOWER]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with http.server.HTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}")
        place = "http://storage.example/eva_vit_g.pth"
        assert bring(SourceFile(TOWER, (place,))) == web.files[TOWER]
        server.shutdown()
    assert asked == [place]
