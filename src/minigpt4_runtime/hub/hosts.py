"""One request for one published file, to the Hub, to Drive or to a plain server.

Owns   addresses, tokens, Drive's page about large files, and the meaning of each refusal.
Takes  a place as the table writes it, and the first byte to ask for; gives a HostReply to read.
Never  writes a file, and never asks twice: a Hiccup is worth another try, a HostRefusal is not.
"""

import base64
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from minigpt4_runtime.checkpoint.file_kind import HEAD_BYTES, is_lfs_pointer, is_web_page
from minigpt4_runtime.checkpoint.sources import HUB_PLACE, is_web_address
from minigpt4_runtime.errors import BackendUnavailableError, ConfigError
from minigpt4_runtime.optional import require

if TYPE_CHECKING:
    from httpx2 import URL, Client, Response


_DRIVE_URL = "https://drive.google.com/uc?export=download&id={}"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_PAGE_BYTES = 2**18
_DRIVE_CLASSES = ("uc-error-caption", "uc-error-subcaption")
_TIMEOUT_SECONDS = 30.0


class HostRefusal(Exception):
    """This host will not give the file, and another try is useless."""


class Hiccup(Exception):
    """A failure that may pass. `wait_seconds` is the wait that the host asks for, if any."""

    def __init__(self, text: str, wait_seconds: float | None = None) -> None:
        super().__init__(text)
        self.wait_seconds = wait_seconds


class TooFewBytes(Hiccup):
    """The file ends before the byte that was asked for: it is another one now."""


@dataclass(frozen=True)
class FileAddress:
    """Where to ask. `page` is where a person can go, `gate` where a licence must be accepted."""

    url: str
    page: str
    gate: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def host(self) -> str:
        """The host's name for messages, without a mirror's password."""
        return urlsplit(self.url).netloc.rpartition("@")[2]


@dataclass(frozen=True)
class HostReply:
    """The head of a host's reply, and the bytes of the file from `start` on.

    `validator` is an ETag to resume with; `sha256` and `md5` are in hex, if the host gives them.
    """

    start: int
    size: int | None
    validator: str | None
    sha256: str | None
    md5: str | None
    head: bytes
    chunks: Iterator[bytes]


def find_address(place: str) -> FileAddress:
    """Turn a place of the table into an address; one on Drive may be any link to the file.

    Raises:
        BackendUnavailableError: the extra is not installed.
        ConfigError: HF_ENDPOINT is no address.
    """
    match = HUB_PLACE.fullmatch(place)
    if match is None:
        drive_id, _ = require("gdown", extra="hub").parse_url.parse_url(place)
        url = place if drive_id is None else _DRIVE_URL.format(drive_id)
        return FileAddress(url, _hide_password(place))
    space, repository, revision, name = match.groups()
    endpoint = _read_endpoint()  # First: the library cannot be imported where it is none.
    hub = require("huggingface_hub", extra="hub")
    url = hub.hf_hub_url(
        repository,
        name,
        repo_type="space" if space else None,
        revision=revision,
        endpoint=endpoint,
    )
    gate = _hide_password(f"{endpoint}/{space or ''}{repository}")
    # The library finds a token where its users keep one: HF_TOKEN, or what `hf auth login` wrote.
    token = hub.get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return FileAddress(url, _hide_password(url), gate, headers)


def _read_endpoint() -> str:
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not is_web_address(endpoint):
        raise ConfigError(
            f"HF_ENDPOINT is {endpoint!r}; it must be an address that begins with https:// or "
            "http://."
        )
    return endpoint


def _hide_password(url: str) -> str:
    return re.sub(r"//[^/?#]*@", "//", url)


def open_client() -> "Client":
    """An HTTP client that follows redirects and honours HTTP_PROXY, HTTPS_PROXY and NO_PROXY.

    Raises:
        BackendUnavailableError: an extra that is needed, here or by the proxy, is not installed.
        ConfigError: a proxy's address is none.
    """
    httpx2 = require("httpx2", extra="hub")
    try:
        client: Client = httpx2.Client(follow_redirects=True, timeout=_TIMEOUT_SECONDS)
    except (ValueError, httpx2.InvalidURL) as error:
        raise ConfigError(
            f"A proxy that the environment names cannot be used ({error}). Its address must begin "
            "with http://, https:// or socks5://; look at HTTP_PROXY, HTTPS_PROXY and ALL_PROXY."
        ) from None
    except ImportError:
        names = [name for name, value in os.environ.items()
                 if name.lower().endswith("_proxy") and value.startswith("socks")]  # fmt: skip
        raise BackendUnavailableError(
            f"{' and '.join(names) or 'The system'} names a SOCKS proxy, and socksio, which speaks "
            "to one, is not installed. Run: pip install 'httpx2[socks]'"
        ) from None
    return client


@contextmanager
def open_reply(
    client: "Client", address: FileAddress, *, start: int = 0, validator: str | None = None
) -> Iterator[HostReply]:
    """Ask for a file from byte `start` on, provided that it is still the one of `validator`.

    Raises:
        Hiccup: the host is busy, or the connection broke.
        HostRefusal: the host has no such file for us, or gives something else.
    """
    httpx2 = require("httpx2", extra="hub")
    try:
        with _open_response(client, address, start, validator) as response:
            yield _read_reply(address, response, start)
    except httpx2.UnsupportedProtocol as error:
        raise HostRefusal(f"it cannot be asked ({error})") from None
    except httpx2.TransportError as error:
        raise Hiccup(f"the connection broke ({str(error) or type(error).__name__})") from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise HostRefusal(f"it cannot be asked ({error})") from None


@contextmanager
def _open_response(
    client: "Client", address: FileAddress, start: int, validator: str | None
) -> Iterator["Response"]:
    """The response with the file: for a large one, Drive asks for a confirmation first."""
    # A size or a range is of use only if nothing packs the bytes on their way.
    headers = {**address.headers, "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if validator is not None:
            headers["If-Range"] = validator
    with client.stream("GET", address.url, headers=headers) as response:
        _check_status(address, response)
        is_page = response.headers.get("Content-Type", "").startswith("text/html")
        # The Hub asks nothing, and its token is for no address that a page names.
        if address.gate is not None or not is_page:
            yield response
            return
        confirmed = _confirm(response)
    with client.stream("GET", confirmed, headers=headers) as response:
        _check_status(address, response)
        yield response


def _read_reply(address: FileAddress, response: "Response", start: int) -> HostReply:
    if (packing := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
        raise HostRefusal(f"it packs the file on its way ({packing}), though it was asked not to")
    # Unbuffered: a lost connection would lose the buffer.
    chunks = response.iter_raw()
    head = b""
    while len(head) < HEAD_BYTES and (chunk := next(chunks, None)) is not None:
        head += chunk
    if response.status_code != 206:
        start = 0
        _refuse_stand_in(head)
        _refuse_open_end(response)
    # The Hub gives size and digest before it redirects to its storage.
    headers = [each.headers for each in (*response.history, response)]
    etags = [each.get("X-Linked-ETag") or each.get("ETag") or "" for each in headers]
    digests = [etag.removeprefix("W/").strip('"') for etag in etags] if address.gate else []
    linked = [each["X-Linked-Size"] for each in headers if "X-Linked-Size" in each]
    validator = response.headers.get("ETag")
    return HostReply(
        start=start,
        size=_read_size(response, start, linked),
        validator=None if validator is None or validator.startswith("W/") else validator,
        sha256=next((digest for digest in digests if _SHA256.fullmatch(digest)), None),
        md5=_read_md5(response),
        head=head,
        chunks=chunks,
    )


def _read_size(response: "Response", start: int, linked: list[str]) -> int | None:
    """The whole file's size, from whichever header tells it."""
    if response.status_code == 206:
        found = re.fullmatch(
            r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", "").strip()
        )
        if found is None or int(found[1]) != start:
            raise HostRefusal(
                f"it was asked for the bytes from {start} on and answered with "
                f"{response.headers.get('Content-Range', 'others')!r}"
            )
        return int(found[2])
    texts = (*linked, response.headers.get("Content-Length", ""))
    sizes = {int(text) for text in texts if text.isdecimal()}
    if len(sizes) > 1:
        raise HostRefusal(f"it speaks of {' and of '.join(map(str, sorted(sizes)))} bytes at once")
    return next(iter(sizes), None)


def _read_md5(response: "Response") -> str | None:
    """The md5 that Google's storage gives a file: `x-goog-hash: md5=…`, in base 64."""
    for entry in response.headers.get("x-goog-hash", "").split(","):
        name, _, value = entry.strip().partition("=")
        if name == "md5":
            with suppress(ValueError):
                return base64.b64decode(value).hex()
    return None


def _refuse_stand_in(head: bytes) -> None:
    if is_web_page(head):
        raise HostRefusal(f"it gave a web page in place of the file ({_read_page(head)})")
    if is_lfs_pointer(head):
        raise HostRefusal("it gave a Git LFS pointer in place of the file")


def _refuse_open_end(response: "Response") -> None:
    """Refuse a reply without a length: a lost connection would look like its end."""
    if not {"content-length", "transfer-encoding"} & set(response.headers):
        raise HostRefusal("it does not say how long its file is, so that a cut could not be told")


def _check_status(address: FileAddress, response: "Response") -> None:
    code = response.status_code
    if code in (200, 206):
        return
    reason = f"it answered {code} {response.reason_phrase}".rstrip()
    if code in (408, 425, 429) or code >= 500:
        raise Hiccup(reason, _read_wait(response))
    if code == 416:
        raise TooFewBytes("it has fewer bytes than were here already")
    if code in (401, 403) and address.gate is not None:
        raise HostRefusal(_describe_gate(address, response, reason))
    raise HostRefusal(reason)


def _describe_gate(address: FileAddress, response: "Response", reason: str) -> str:
    """Why the Hub refuses: it needs a token, or the licence must be accepted first."""
    message = response.headers.get("X-Error-Message", "")
    seen = f"{reason} ({message[:120]})" if message else reason
    login = "make a token at https://huggingface.co/settings/tokens and run `hf auth login`, or set"
    if response.headers.get("X-Error-Code") == "RepoNotFound":
        return f"{seen}: there is no such repository, or it is private"
    has_token = "Authorization" in address.headers
    if response.status_code != 403 and response.headers.get("X-Error-Code") != "GatedRepo":
        fault = (
            "your token is not valid, or has expired" if has_token else "it wants to know who asks"
        )
        return f"{seen}: {fault}; {login} HF_TOKEN to it"
    if not has_token:
        return (
            f"{seen}: it wants to know who asks. Accept the licence at {address.gate}, {login} "
            "HF_TOKEN to it, and try again"
        )
    return (
        f"{seen}: your token opens it only once you have accepted the licence at {address.gate} "
        "(an owner may take days to grant it), and if the token may read gated repositories"
    )


def _read_wait(response: "Response") -> float | None:
    """Seconds or a date, as Retry-After may be either."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _confirm(response: "Response") -> "URL":
    """The link on the page on which Drive asks to confirm a file too large for its virus scan."""
    content = b""
    for chunk in response.iter_raw():
        content += chunk
        if len(content) > _LONGEST_PAGE_BYTES:
            break
    gdown = require("gdown.download", extra="hub")
    try:
        url = gdown.get_url_from_gdrive_confirmation(content.decode("utf-8", errors="replace"))
    except Exception:  # noqa: BLE001 - A page of any kind, which gdown's parsers stumble over.
        raise HostRefusal(
            f"it gave a web page in place of the file ({_read_page(content)})"
        ) from None
    return response.url.join(url)


class _PageParser(HTMLParser):
    """Collects a page's title, and Drive's message about a failure."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._shown: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "title" or dict(attrs).get("class") in _DRIVE_CLASSES:
            self._shown = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._shown:
            self._shown = None

    def handle_data(self, data: str) -> None:
        if self._shown and data.strip():
            self.texts.append(" ".join(data.split()))


def _read_page(content: bytes) -> str:
    parser = _PageParser()
    # Python's parser raises it at a malformed declaration; texts before that are kept.
    with suppress(AssertionError):
        parser.feed(content.decode("utf-8", errors="replace"))
    return ". ".join(dict.fromkeys(parser.texts))[:200] or "without a title"
