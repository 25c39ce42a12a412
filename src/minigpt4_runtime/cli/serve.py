"""`minigpt4 serve`: the OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4_runtime.cli.options import CacheWindow, ServedOptions, flag, option, spread_options
from minigpt4_runtime.cli.web import ExamplesOption, chat_page, check_page
from minigpt4_runtime.config import EngineConfig
from minigpt4_runtime.errors import ConfigError
from minigpt4_runtime.optional import require
from minigpt4_runtime.server.settings import ConnectionLimits, ServerConfig

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4

_CLOSE_SECONDS = 3
_DEMO_DESCRIPTION = "It is a bundled demo model, which knows only drawn scenes."


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """The server's address, its keys, and the places from which it opens pictures."""

    host: Annotated[str, option("ADDRESS", "Where to listen; 0.0.0.0 is every network.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, option("NUMBER", "0 takes a free one, which is printed.")] = 8000
    api_key_file: Annotated[
        Path | None,
        option("FILE", "API keys, one a line. All but /health then needs one."),
    ] = None
    insecure: Annotated[
        bool,
        flag("Let a whole network in without keys, and under whatever name.", "--insecure"),
    ] = False
    allow_origin: Annotated[
        list[str] | None,
        option("ORIGIN", "Let this site's pages ask (CORS). May be repeated."),
    ] = None
    allow_media_domain: Annotated[
        list[str] | None,
        option("HOST", "Fetch pictures from this host, HOST or HOST:PORT. May be repeated."),
    ] = None
    allow_media_dir: Annotated[
        Path | None, option("DIR", "Open file: URLs within this folder.")
    ] = None
    trusted_proxy: Annotated[
        list[str] | None,
        option(
            "ADDRESS",
            "Believe this proxy, an address or a network, about its clients. May be repeated; "
            "one on this machine is believed without.",
        ),
    ] = None

    def read_keys(self) -> tuple[str, ...]:
        """The API keys.

        Raises:
            ConfigError: they cannot be read, or are missing for a server on a network.
        """
        from minigpt4_runtime.server import auth

        keys = auth.read_keys(self.api_key_file) if self.api_key_file else ()
        auth.check_host(self.host, has_keys=bool(keys), is_insecure=self.insecure)
        return keys


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """The limits on requests, on answers in progress, and on times."""

    max_requests: Annotated[
        int,
        option("COUNT", "Answers let in at once, running or waiting; beyond it is a 429."),
    ] = ServerConfig.max_requests
    max_running: Annotated[int, option("COUNT", "Answers that run at once; the others wait.")] = (
        EngineConfig.max_running
    )
    max_connections: Annotated[
        int,
        option(
            "COUNT",
            "Connections at once; beyond it the one that waits longest to ask is closed.",
            min=1,
        ),
    ] = ConnectionLimits.most
    max_connections_per_client: Annotated[
        int,
        option(
            "COUNT",
            "Connections, and answers, of one client's address; 0 for no limit. Programs on "
            "this machine are not counted.",
            min=0,
        ),
    ] = ConnectionLimits.per_client or 0
    max_body_mib: Annotated[
        int, option("MIB", "The largest body, and the largest picture.", min=1)
    ] = ServerConfig.max_body_bytes // 2**20
    max_uploads_mib: Annotated[
        int,
        option("MIB", "Pictures uploaded to the chat page, kept for an hour each.", min=1),
    ] = 1024
    max_images: Annotated[int, option("COUNT", "Pictures in one request.")] = (
        ServerConfig.max_images
    )
    max_pixels: Annotated[int, option("COUNT", "Width times height of one picture.")] = 40_000_000
    cache_window: CacheWindow = None
    max_tokens: Annotated[int, option("COUNT", "Tokens of one answer that may be asked for.")] = (
        ServerConfig.max_tokens
    )
    request_seconds: Annotated[float, option("SECONDS", "How long one answer may take.")] = (
        ServerConfig.request_seconds
    )
    grace_seconds: Annotated[
        float,
        option("SECONDS", "How long running answers may take after SIGTERM."),
    ] = 30.0
    stall_seconds: Annotated[
        float,
        option(
            "SECONDS",
            "An engine that is asked and makes no step for twice so long has failed: "
            "exit status 1.",
        ),
    ] = ServerConfig.stall_seconds


@spread_options
def serve(
    *,
    access: AccessOptions,
    limits: LimitOptions,
    name: Annotated[
        str | None,
        option("NAME", "The model's name in requests. Without it: its folder's name."),
    ] = None,
    ui: Annotated[
        bool, flag("Show a chat page at / as well; a browser then finds it.", "--ui")
    ] = False,
    examples_dir: ExamplesOption = None,
    explains: Annotated[
        bool,
        flag(
            "Answer POST /explain, and show on the chat page where a word of an answer looked when "
            "it is clicked: each takes one pass over all that stands before the word.",
            "--explain",
        ),
    ] = False,
    log_format: Annotated[str, option("FORMAT", "plain or json.")] = "plain",
    log_content: Annotated[
        bool, flag("Write prompts, pictures and answers to the log.", "--log-content")
    ] = False,
    where: ServedOptions,
) -> None:
    """Serve the model over HTTP, as OpenAI's chat completions.

    The URL goes to stdout when questions are answered. SIGTERM or Ctrl-C lets running answers end,
    a second one does not. The log goes to stderr and holds no prompts and no keys.
    docs/serving.md shows clients, a proxy with TLS, and how to run it as a service.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, extra="server")
    if ui:
        check_page(examples_dir)
    elif examples_dir is not None:
        raise ConfigError("--pictures is for the chat page. Add --ui.")
    from minigpt4_runtime.server import listen, logs

    if not limits.grace_seconds >= 0:
        raise ConfigError(f"--grace-seconds is {limits.grace_seconds:g}; it must be 0 or more.")
    if log_format not in ("plain", "json"):
        raise ConfigError(f"--log-format is {log_format!r}; it must be plain or json.")
    if explains and where.tensor_parallel > 1:
        raise ConfigError("--explain looks into a model as a whole: leave out --tensor-parallel.")
    settings = _settings(access, limits, where, name=name, log_content=log_content)
    config = replace(settings, explains=explains)
    listen.keep_memory_together()
    listener = listen.bind(access.host, access.port)
    # The notice about the demo model is not JSON.
    model = _load(where, limits, config, announce_demo=log_format == "plain")
    logs.set_up_logs("json" if log_format == "json" else "plain")
    from minigpt4_runtime.server.app import create_app

    app, url = create_app(model, config, asks_browsers=ui), listen.url_of(listener)
    page = chat_page(
        app, url, config.api_keys, examples_dir=examples_dir, max_image_bytes=config.max_body_bytes,
        max_kept_bytes=limits.max_uploads_mib * 2**20,
    )  # fmt: skip
    with page if ui else nullcontext():
        listen.keep_what_is_loaded()
        serving = listen.serve(
            app, listener, limits.grace_seconds, on_start=lambda: print(url, flush=True)
        )
        status = asyncio.run(serving)
    _close(model, status)
    raise typer.Exit(status)


def _settings(
    access: AccessOptions,
    limits: LimitOptions,
    where: ServedOptions,
    *,
    name: str | None,
    log_content: bool,
) -> ServerConfig:
    keys = access.read_keys()
    return ServerConfig(
        model_name=name or (where.model.resolve().name if where.model else "minigpt4-demo"),
        model_description=_DEMO_DESCRIPTION if where.is_demo() else ServerConfig.model_description,
        api_keys=keys,
        allowed_origins=tuple(access.allow_origin or ()),
        own_names_only=not (keys or access.insecure),
        connections=ConnectionLimits(
            most=limits.max_connections,
            per_client=limits.max_connections_per_client or None,
            proxies=tuple(access.trusted_proxy or ()),
        ),
        media_domains=tuple(access.allow_media_domain or ()),
        media_dir=access.allow_media_dir,
        max_requests=limits.max_requests,
        max_body_bytes=limits.max_body_mib * 2**20,
        max_images=limits.max_images,
        max_tokens=limits.max_tokens,
        request_seconds=limits.request_seconds,
        stall_seconds=limits.stall_seconds,
        logs_content=log_content,
    )


def _load(
    where: ServedOptions, limits: LimitOptions, config: ServerConfig, *, announce_demo: bool
) -> MiniGPT4:
    from minigpt4_runtime.images.pixels import ImageLimits

    running, step = limits.max_running, max(EngineConfig.max_step_tokens, limits.max_running)
    return where.load(
        announce_demo=announce_demo,
        engine=EngineConfig(
            max_running=running, max_step_tokens=step, cache_window=limits.cache_window
        ),
        image_limits=ImageLimits(max_bytes=config.max_body_bytes, max_pixels=limits.max_pixels),
    )


def _close(model: MiniGPT4, status: int) -> None:
    closing = threading.Thread(target=model.close, daemon=True)
    closing.start()
    closing.join(_CLOSE_SECONDS)
    if closing.is_alive():
        # The engine's thread is stuck in a step, and Python would wait for it for ever.
        os._exit(status or 1)
