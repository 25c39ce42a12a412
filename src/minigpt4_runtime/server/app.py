"""The application: its routes and the guards around them.

Owns   the URLs, and the order of the guards.
Takes  a loaded model and a ServerConfig; gives a FastAPI application. Others may be mounted to it,
       at `/` too: the guards stand around those as well.
Never  does a route's work itself.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketClose

from minigpt4_runtime import __version__
from minigpt4_runtime.errors import ConfigError, MiniGPT4Error
from minigpt4_runtime.server.absent import RequestPart
from minigpt4_runtime.server.admission import Admission, Slot
from minigpt4_runtime.server.answered import (
    ChatCompletion,
    ErrorBody,
    ModelCard,
    ModelList,
    Status,
    Version,
)
from minigpt4_runtime.server.auth import KeyGuard, NameGuard
from minigpt4_runtime.server.chat import Chat, Endpoint
from minigpt4_runtime.server.completions import (
    CompletionRequest,
    TextCompletion,
    TextWriter,
)
from minigpt4_runtime.server.explained import Explained, ExplainRequest
from minigpt4_runtime.server.failures import Failure, error_response, failure_of, no_such_model
from minigpt4_runtime.server.journal import Journal
from minigpt4_runtime.server.logs import log_failure
from minigpt4_runtime.server.metrics import Metrics
from minigpt4_runtime.server.protocol import ChatRequest, request_schemas
from minigpt4_runtime.server.responses import ResponseAnswer, ResponseRequest, ResponseWriter
from minigpt4_runtime.server.settings import ServerConfig
from minigpt4_runtime.server.streaming import ChatWriter
from minigpt4_runtime.server.tokens import Tokenized, TokenizeRequest
from minigpt4_runtime.server.watch import EngineWatch, engine_failed

if TYPE_CHECKING:
    from minigpt4_runtime.api import MiniGPT4

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "Something that was asked is wrong or not supported; param names it.",
        401: "An API key is needed.",
        403: "Without keys it answers to localhost and to addresses only.",
        404: "There is no such model.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        415: "The body is not application/json.",
        429: "The server is full; Retry-After says when to try again.",
        503: "The server shuts down, or its engine failed.",
        504: "The answer took too long.",
    }.items()
}
_NOT_LET_IN: dict[int | str, dict[str, Any]] = {each: _ERRORS[each] for each in (401, 403)}


ENDPOINTS = (
    Endpoint(
        "/v1/chat/completions",
        "Answer the last message of a dialogue, whole or as server-sent events.",
        ChatRequest, ChatCompletion, ChatWriter,
    ),
    Endpoint(
        "/v1/completions",
        "Go on from a text as it is, whole or as server-sent events.",
        CompletionRequest, TextCompletion, TextWriter,
    ),
    Endpoint(
        "/v1/responses",
        "Answer the last message of a dialogue, as a response or as its events.",
        ResponseRequest, ResponseAnswer, ResponseWriter,
    ),
)  # fmt: skip
_ASKED: list[type[RequestPart]] = [*(endpoint.asked for endpoint in ENDPOINTS), TokenizeRequest]


class Parts:
    """The objects that the routes share, as `app.state.parts`."""

    def __init__(self, model: "MiniGPT4", config: ServerConfig) -> None:
        self.config = config
        self.admission = Admission(config.max_requests, config.connections.per_client)
        self.metrics = Metrics(model, lambda: self.admission.num_taken)
        self.watch = EngineWatch(
            model,
            stall_seconds=config.stall_seconds,
            is_asked=lambda: self.admission.is_answering,
            on_failure=self._end_all,
        )
        self.chat = Chat(model, config, metrics=self.metrics, watch=self.watch)
        card = ModelCard(
            id=config.model_name,
            created=int(time.time()),
            description=config.model_description,
            tasks=model.tasks,
            explains=config.explains,
        )
        if card.id in model.adapters:
            raise ConfigError(f"The model and an adapter are both named {card.id!r}. Rename one.")
        tuned = (card.model_copy(update={"id": name, "parent": card.id}) for name in model.adapters)
        self.cards = {each.id: each for each in (card, *tuned)}
        # Called when the engine has failed and its requests have been ended.
        self.on_failure: Callable[[], object] = lambda: None

    def _end_all(self) -> None:
        self.admission.abort_all(engine_failed())
        self.on_failure()


def create_app(model: "MiniGPT4", config: ServerConfig, *, asks_browsers: bool = False) -> FastAPI:
    """Make the application; its life begins and ends with the server's.

    With `asks_browsers` browsers prompt their users for a key, as for a password.
    """
    parts = Parts(model, config)

    @asynccontextmanager
    async def live(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(parts.watch.run())
        yield
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        parts.chat.close()

    app = FastAPI(
        title="MiniGPT-4 Runtime",
        version=__version__,
        lifespan=live,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.parts = parts
    for kind in (Failure, MiniGPT4Error, HTTPException):
        app.add_exception_handler(kind, _answer_error)
    _add_asking_routes(app, parts)
    _add_other_routes(app, parts)
    _close_own_paths(app)
    asked = request_schemas([*_ASKED, *([ExplainRequest] if config.explains else ())])
    app.openapi()["components"]["schemas"].update(asked)
    # The last one added is the outermost.
    app.add_middleware(KeyGuard, keys=config.api_keys, asks_browsers=asks_browsers)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.allowed_origins, allow_methods=["GET", "POST"],
            allow_headers=["*"], expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
    if config.own_names_only:
        app.add_middleware(NameGuard)
    app.add_middleware(Journal, count=parts.metrics.count_request)
    return app


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    if failure_of(error).status == 500:
        log_failure(error, request_id=request.scope["state"]["request_id"])
    return error_response(error)


def _add_asking_routes(app: FastAPI, parts: Parts) -> None:
    async def hold_slot(request: Request) -> AsyncIterator[Slot]:
        # Released when the last byte of the answer is sent, or its client has gone away.
        client = parts.config.connections.client_of(request.client and request.client.host)
        with parts.admission.enter(client) as slot:
            yield slot

    def add(endpoint: Endpoint) -> None:
        @app.post(
            endpoint.path, response_model=endpoint.answered, responses=_ERRORS,
            openapi_extra=_body_of(endpoint.asked), summary=endpoint.summary,
            operation_id=endpoint.path.replace("/", "_").strip("_"),
        )  # fmt: skip
        async def answer(request: Request, slot: Annotated[Slot, Depends(hold_slot)]) -> Response:
            return await parts.chat.answer(request, slot, endpoint)

    for endpoint in ENDPOINTS:
        add(endpoint)

    if parts.config.explains:

        @app.post("/explain", responses=_ERRORS, openapi_extra=_body_of(ExplainRequest))
        async def explain(request: Request, slot: Annotated[Slot, Depends(hold_slot)]) -> Explained:
            """Say where a word of an answer looked on the pictures before it."""
            return await parts.chat.explain(request, slot)

    @app.post("/tokenize", responses=_ERRORS, openapi_extra=_body_of(TokenizeRequest))
    async def tokenize(request: Request, slot: Annotated[Slot, Depends(hold_slot)]) -> Tokenized:
        """Give the ids of a prompt or a dialogue."""
        return await parts.chat.tokenize(request, slot)


def _body_of(kind: type[RequestPart]) -> dict[str, Any]:
    """The OpenAPI entry of a body, which is read by hand within limits."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _close_own_paths(app: FastAPI) -> None:
    """Refuse other methods and paths of the API, before an application mounted at / does."""
    methods: dict[str, set[str]] = {}
    for route in app.routes:
        if isinstance(route, APIRoute):
            methods.setdefault(route.path, set()).update(route.methods or ())
    bare = [path.removeprefix("/v1") for path in methods if path.startswith("/v1/")]
    app.router.routes += [
        *(Route(path, _Refusing(", ".join(sorted(known)))) for path, known in methods.items()),
        *(Route(path, _Refusing(None)) for path in (*bare, "/v1", "/v1/{rest:path}")),
    ]
    app.router.default = _Refusing(None)


@dataclass
class _Refusing:
    """Refuses requests of any method: 405 where others are `allowed`, else 404."""

    allowed: str | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse."""
        if scope["type"] == "websocket":
            await WebSocketClose()(scope, receive, send)
            return
        if self.allowed:
            raise HTTPException(405, headers={"Allow": self.allowed})
        raise HTTPException(404, _missing(scope["path"]))


def _missing(path: str) -> str:
    """The message about an unknown path, with advice if the client's base URL is wrong."""
    if path == "/":
        return (
            "This is an API for programs: their base URL ends in /v1, and /openapi.json lists what "
            "there is. `minigpt4 serve --ui` shows a chat page here."
        )
    if not f"{path}/".startswith("/v1/"):
        return f"There is nothing at {path[:100]}: let the client's base URL end in /v1."
    if path.startswith("/v1/v1/"):
        return "The path has /v1 twice: leave it out of the client's base URL, or of the path."
    return f"There is nothing at {path[:100]}. /openapi.json lists what there is."


def _add_other_routes(app: FastAPI, parts: Parts) -> None:
    @app.get("/v1/models/", include_in_schema=False)
    @app.get("/v1/models", responses=_NOT_LET_IN)
    async def models() -> ModelList:
        """Name the model that answers here, and its adapters."""
        return ModelList(data=list(parts.cards.values()))

    # A model's name may have slashes in it.
    @app.get("/v1/models/{model:path}", responses={**_NOT_LET_IN, 404: _ERRORS[404]})
    async def model_card(model: str) -> ModelCard:
        """Say whether this model answers here."""
        if model not in parts.cards:
            raise no_such_model(model, list(parts.cards))
        return parts.cards[model]

    @app.get("/version", responses=_NOT_LET_IN)
    async def version() -> Version:
        """Say which version of this server answers."""
        return Version(version=__version__)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={403: _ERRORS[403]})
    async def health() -> Status:
        """Say that the process is alive."""
        return Status(status="alive")

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses={**_NOT_LET_IN, 503: {"model": Status}})
    async def ready(response: Response) -> Status:
        """Say whether a question would be answered now."""
        reason = parts.watch.trouble or parts.admission.why_closed
        if reason is None:
            return Status(status="ready")
        response.status_code = 503
        return Status(status="not ready", reason=reason)

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", responses=_NOT_LET_IN, response_class=Response)
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        text = parts.metrics.as_text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
