"""The published hosts on loopback: how the Hub, its store, Drive and a bucket answer, and fail.

A Web has two ports. `site` is the Hub, Drive and the bucket; `store` is where the Hub and Drive
send one on to: another origin, which must never see a token. `Web.mishaps` makes requests go wrong.
"""

import base64
import hashlib
import html
import json
import re
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

GOLDENS = Path(__file__).parent / "goldens"
BUCKET = "/sfr-vision-language-research/LAVIS/models/BLIP2"
TOKEN = "hf_the_right_one"
DRIVE_IDS = {
    "pretrained_minigpt4_7b.pth": "1RY9jV0dyqLX",
    "pretrained_minigpt4_llama2_7b.pth": "11nAPjEok8eA",
}


@dataclass(frozen=True)
class Mishap:
    """What happens to one request: a status, a page, or bytes that stop coming."""

    status: int | None = None
    headers: dict[str, str | None] = field(default_factory=dict)  # None: not even the usual one.
    page: bytes | None = None
    cut_after: int | None = None
    stalls: bool = False  # Keep the connection open after the cut, until the web ends.
    content: bytes | None = None  # Other bytes than the published ones.


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    origin: str
    path: str
    headers: dict[str, str]


@dataclass
class Web:
    """All hosts. `files` are the published ones by name; `gated` repositories want TOKEN."""

    files: dict[str, bytes]
    gated: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    mishaps: dict[str, list[Mishap]] = field(default_factory=lambda: defaultdict(list))
    seen: list[Seen] = field(default_factory=list)
    site: str = ""
    store: str = ""
    scans: bool = True  # Whether Drive asks before it gives a file.
    has_etags: bool = True
    ignores_ranges: bool = False
    ignores_if_range: bool = False
    stalled: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def requests_for(self, name: str, origin: str | None = None) -> list[Seen]:
        """The requests that were about a file, in order."""
        return [each for each in self.seen if name in each.path and origin in (None, each.origin)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web
    origin: str

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        shown = self.path
        if "id" in query:
            (name,) = [name for name, each in DRIVE_IDS.items() if each == query["id"]]
            shown = f"{self.path}#{name}"
        else:
            name = url.path.rsplit("/", 1)[-1]
            name = f"bert/{name}" if "bert-base-uncased" in url.path else name
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.web.seen.append(Seen(self.origin, shown, headers))
        if self.origin == "store" and "authorization" in headers:
            self.reply(400, b"Only one auth mechanism allowed")
        elif "id" in query:
            self.drive(url.path, query, name)
        elif "/resolve/" in url.path:
            self.hub(url.path, name)
        else:
            self.give(name)

    def hub(self, path, name):
        repository = re.match(r"/(?:spaces/)?([^/]+/[^/]+)/resolve/", path)[1]
        sent = self.headers.get("Authorization")
        if repository in self.web.gated and sent != f"Bearer {TOKEN}":
            message = f"Access to model {repository} is restricted."
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": message}
            self.reply(403 if sent else 401, message.encode(), headers)
        elif repository in self.web.gone:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self.reply(401, b"Repository not found", headers)
        elif name not in self.web.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self.reply(404, b"Entry not found", headers)
        elif name.endswith(".json"):
            self.give(name)
        else:
            content = self.web.files[name]
            headers = {
                "Location": f"{self.web.store}/blobs/{name}?signed=yes",
                "X-Linked-Size": str(len(content)),
                "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": "0" * 40,
            }
            self.reply(302, b"", headers)

    def drive(self, path, query, name):
        if path == "/uc":
            target = f"{self.web.store}/download?id={query['id']}&export=download"
            self.reply(303, b"", {"Location": target})
        elif self.web.scans and query.get("confirm") != "t":
            page = (  # Drive writes it in one line.
                "<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head>"
                "<body><p class='uc-warning-caption'>Google Drive can't scan this file.</p>"
                f"<form id='download-form' action='{html.escape(self.web.store)}/download' "
                "method='get'><input type='submit' id='uc-download-link' value='Download anyway'/>"
                f"<input type='hidden' name='id' value='{query['id']}'/>"
                "<input type='hidden' name='export' value='download'/>"
                "<input type='hidden' name='confirm' value='t'/>"
                "<input type='hidden' name='uuid' value='f00d'/></form></body></html>"
            )
            self.reply(200, page.encode(), {"Content-Type": "text/html; charset=utf-8"})
        else:
            self.give(name, validates=False)

    def give(self, name, validates=True):
        mishap = self.web.mishaps[name].pop(0) if self.web.mishaps[name] else Mishap()
        if mishap.status is not None:
            self.reply(mishap.status, b"not now", mishap.headers)
            return
        if mishap.page is not None:
            self.reply(200, mishap.page, {"Content-Type": "text/html"} | mishap.headers)
            return
        if name not in self.web.files:
            self.reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        content = self.web.files[name] if mishap.content is None else mishap.content
        etag = f'"{hashlib.md5(content).hexdigest()}"' if validates and self.web.has_etags else None
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if etag:
            headers["ETag"] = etag
        if BUCKET in self.path:
            digest = base64.b64encode(hashlib.md5(content).digest()).decode()
            headers["x-goog-hash"] = f"crc32c=AAAAAA==,md5={digest}"
        self.reply_in_part(content, headers | mishap.headers, mishap.cut_after)
        if mishap.stalls:
            self.web.stalled.set()
            self.web.ended.wait()

    def reply_in_part(self, content, headers, cut_after):
        """Honour Range and If-Range."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") in (None, headers.get("ETag"))
        if asked is None or not (same or self.web.ignores_if_range) or self.web.ignores_ranges:
            self.reply(200, content, headers, cut_after)
            return
        start = int(asked[1])
        if start >= len(content):
            self.reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(206, content[start:], headers, cut_after)

    def reply(self, status, body, headers=None, cut_after=None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if cut_after is None else body[:cut_after])
        if cut_after is not None:
            self.close_connection = True


def start_web(files: dict[str, bytes]):
    """Give a Web at work, and what ends it."""
    web = Web(files)
    servers = []
    for origin in ("site", "store"):
        handler = type("Handler", (_Handler,), {"web": web, "origin": origin})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        # A client that goes away in the middle is what these tests are about.
        server.handle_error = lambda *_: None
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        setattr(web, origin, f"http://127.0.0.1:{server.server_port}")
        servers.append(server)

    def end():
        web.ended.set()
        for server in servers:
            server.shutdown()
            server.server_close()

    return web, end


def golden_files(variant: str) -> dict[str, bytes]:
    """A golden checkpoint's files under the published names; BERT's config is apart."""
    folder = GOLDENS / variant / "checkpoint"
    paths = [*folder.glob("*.pth"), *(folder / "llama").iterdir()]
    files = {path.name: path.read_bytes() for path in paths}
    for path in folder.glob("bert-base-uncased/*"):
        files[f"bert/{path.name}"] = path.read_bytes()
    return files


def write_table(web: Web, path: Path, variant: str, name: str, preset: str | None = None) -> Path:
    """A user's table that leads the published names to this web."""
    shards = sorted(each for each in web.files if each.startswith("pytorch_model"))
    (projection,) = [each for each in web.files if each.startswith("pretrained_minigpt4")]
    language = ["config.json", "tokenizer.model", *shards]
    repository = "Vision-CAIR/vicuna-7b" if variant == "vicuna" else "meta-llama/Llama-2-7b-chat-hf"
    bucket = f"{web.site}{BUCKET}/{{name}}"
    drive = f"{web.site}/uc?export=download&id={DRIVE_IDS[projection]}"
    parts = {
        "language-model": ("language", f"hub:{repository}/{{name}}", language),
        "tower": ("vision", bucket, ["eva_vit_g.pth"]),
        "projection": ("projection", drive, [projection]),
    }
    if variant == "vicuna":
        bert = "hub:google-bert/bert-base-uncased/{name}"
        parts["q-former"] = ("qformer", bucket, ["blip2_pretrained_flant5xxl.pth"])
        parts["bert"] = ("bert", bert, ["config.json"])
    lines = [f"[models.{name}]", f"parts = {json.dumps(list(parts))}"]
    if preset is not None:
        lines.append(f'preset = "{preset}"')
    for part, (role, host, names) in parts.items():
        files = ", ".join(f'{{ name = "{each}" }}' for each in names)
        lines += [
            f"[parts.{part}]",
            f'role = "{role}"',
            f'hosts = ["{host}"]',
            f"files = [{files}]",
        ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
