"""The routes: OpenAI's, vLLM's for adapters that come and go, and those for whoever runs the server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from rankwise.data.template import Template
from rankwise.engine.generate import stops_of
from rankwise.errors import DataError, RankwiseError, RequestError
from rankwise.frozen.load import Base
from rankwise.serving.admission import allowed_folder
from rankwise.serving.engine import Engine
from rankwise.serving.exchange import Exchange, GoneError
from rankwise.serving.guard import Door, Guard
from rankwise.serving.metrics import CONTENT_TYPE, Metrics
from rankwise.serving.pool import Merged, Pool, Through
from rankwise.serving.replies import DONE, ChatReply, Choice, CompletionReply, Reply, event
from rankwise.serving.requests import Wanted
from rankwise.serving.wire import (
    Asked,
    AskedChat,
    AskedCompletion,
    LoadAdapter,
    RefusedError,
    UnloadAdapter,
    read_body,
    refusal,
    unknown_model,
)

_log = logging.getLogger(__name__)
_LEFT = 499  # nginx's status for a client that has left; nobody sees it but the metrics


@dataclass
class Server:
    """What the routes work with.

    Attributes:
        base_names: what the base is called, first as it is listed; empty where it is not served.
        most_tokens: of one answer.
        adapters_dir: where adapters that are loaded over HTTP have to lie.
        any_path: they may lie anywhere.
        active: requests that are being answered.
    """

    engine: Engine
    pool: Pool | Merged
    base: Base
    template: Template
    door: Door
    base_names: tuple[str, ...]
    most_tokens: int = 4096
    adapters_dir: Path | None = None
    any_path: bool = False
    active: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    # One thread: a fast tokenizer must not be asked to encode twice at once.
    reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "rankwise-reader"))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine, self.pool)
        self.ends = frozenset(stops_of(self.template, self.base.model))
        self.context = getattr(self.base.model.config.get_text_config(), "max_position_embeddings", None)

    # ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────

    def adapter(self, model: str) -> str | None:
        """The adapter that a model's name means, None for the base; names are compared whole.

        Raises:
            RefusedError: 404.
        """
        if model in self.base_names:
            return None
        behind = [model.removeprefix(f"{base}:") for base in self.base_names if model.startswith(f"{base}:")]
        for name in (model, *behind):
            if name in self.pool:
                return name
        raise unknown_model(model, [*self.base_names, *self.pool.names])

    async def begun(self, asked: Asked, stack: AsyncExitStack) -> Exchange:
        """The request in the engine's hands; `stack` lets go of what it holds."""
        name = self.adapter(asked.model)
        prompts = await asyncio.get_running_loop().run_in_executor(self.reader, self._prompts, asked)
        most = [self._longest(asked, len(prompt)) for prompt in prompts]
        through = Through(None, "")
        if name is not None:
            through = await stack.enter_async_context(self.pool.through(name))
        ends = frozenset(asked.stop_token_ids or ()) | (frozenset() if asked.ignore_eos else self.ends)
        wanted = [
            Wanted(tuple(prompt), through.key, asked.sampling(number), longest, ends, through.digest)
            for prompt, longest in zip(prompts, most, strict=True)
            for number in range(asked.choices)
        ]
        exchange = Exchange(self.engine, self.base.tokenizer, self.metrics, asked.stops)
        exchange.usage.prompt = sum(map(len, prompts))
        exchange.submit(wanted)
        stack.callback(exchange.cancel)
        return exchange

    def _prompts(self, asked: Asked) -> Sequence[list[int]]:
        if isinstance(asked, AskedChat):
            if self.template.chat is None:
                raise DataError("the model has no chat template", hint="ask /v1/completions")
            return [self.template.generation_prompt([turn.plain() for turn in asked.messages])]
        assert isinstance(asked, AskedCompletion)
        return [self._tokens(prompt) if isinstance(prompt, str) else prompt for prompt in asked.prompts]

    def _tokens(self, text: str) -> list[int]:
        """As in training: behind BOS, where the tokenizer adds one."""
        tokeniser = self.template.tokeniser
        ids, opening = tokeniser.ids(text), list(tokeniser.opening)
        return ids if ids[: len(opening)] == opening else opening + ids

    def _longest(self, asked: Asked, prompt: int) -> int:
        longest = asked.longest
        if longest is None:
            room = self.most_tokens if self.context is None else self.context - prompt
            return max(1, min(self.most_tokens, room, int(self.engine.figures["cache_tokens"]) - prompt))
        if longest > self.most_tokens:
            raise RequestError(
                f"{longest} tokens of answer are asked for, {self.most_tokens} are allowed", hint="--max-tokens"
            )
        return longest


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Stream(Response):
    """Server-sent events; whatever happens, `stack` is closed."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[str], stack: AsyncExitStack) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.chunks, self.stack = chunks, stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self.stack, aclosing(self.chunks) as chunks:  # type: ignore[type-var]  # it is a generator
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for text in chunks:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _watched(request: Request, exchange: Exchange) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    exchange.leave()


async def _answered(server: Server, request: Request, asked: Asked, reply: Reply) -> Response:
    async with AsyncExitStack() as stack:
        server.active += 1
        stack.callback(_left, server)
        exchange = await server.begun(asked, stack)
        watch = asyncio.get_running_loop().create_task(_watched(request, exchange))
        stack.callback(watch.cancel)
        if asked.stream:
            return _Stream(_chunks(exchange, asked, reply), stack.pop_all())
        choices = [Choice() for _ in range(exchange.choices)]
        try:
            async for news in exchange.follow():
                choices[news.number].pieces.append(news.piece)
                choices[news.number].finish = news.finish
        except GoneError:
            return Response(status_code=_LEFT)
        return JSONResponse(reply.whole(choices, exchange.usage))


def _left(server: Server) -> None:
    server.active -= 1


async def _chunks(exchange: Exchange, asked: Asked, reply: Reply) -> AsyncIterator[str]:
    opened: set[int] = set()
    try:
        async for news in exchange.follow():
            if news.number not in opened:
                opened.add(news.number)
                first = reply.opening(news.number)
                if first is not None:
                    yield event(first)
            yield event(reply.chunk(news.number, news.piece, news.finish))
        if asked.wants_usage:
            yield event(reply.closing(exchange.usage))
    except GoneError:
        return
    except RefusedError as refused:  # too late for a status
        yield event(refused.body())
    yield DONE


# ── routes ───────────────────────────────────────────────────────────────────────────────────────────────────────────

Route = Callable[[Server, Request], Awaitable[Response]]


async def _chat(server: Server, request: Request) -> Response:
    asked = read_body(AskedChat, await server.door.read(request))
    reply = ChatReply(asked.model, server.base.tokenizer, logprobs=asked.likeliest is not None)
    return await _answered(server, request, asked, reply)


async def _completion(server: Server, request: Request) -> Response:
    asked = read_body(AskedCompletion, await server.door.read(request))
    reply = CompletionReply(asked.model, server.base.tokenizer, logprobs=asked.likeliest is not None)
    return await _answered(server, request, asked, reply)


def _card(server: Server, name: str, root: str, parent: str | None) -> dict[str, Any]:
    card = {"id": name, "object": "model", "created": server.created, "owned_by": "rankwise"}
    return card | {"root": root, "parent": parent, "max_model_len": server.context}


def _cards(server: Server) -> list[dict[str, Any]]:
    base = server.base_names[0] if server.base_names else None
    cards = [] if base is None else [_card(server, base, server.base.name, None)]
    parent = base or server.base.name
    return cards + [_card(server, name, str(server.pool.folder(name)), parent) for name in server.pool.names]


async def _models(server: Server, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": _cards(server)})


async def _model(server: Server, request: Request) -> Response:
    asked = request.path_params["model"]
    name = server.adapter(asked)
    listed = name if name is not None else server.base_names[0]
    found = next(card for card in _cards(server) if card["id"] == listed)
    return JSONResponse(found | {"id": asked})


async def _load(server: Server, request: Request) -> Response:
    asked = read_body(LoadAdapter, await server.door.read(request))
    folder = allowed_folder(asked.lora_path, server.adapters_dir, any_path=server.any_path)
    await server.pool.add(asked.lora_name, folder, replace=asked.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


async def _unload(server: Server, request: Request) -> Response:
    asked = read_body(UnloadAdapter, await server.door.read(request))
    await server.pool.remove(asked.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


async def _health(server: Server, request: Request) -> Response:
    """For whoever sends requests here or elsewhere: 503 as soon as there is no use in it."""
    status = "stopping" if server.door.closing else "ok" if server.engine.alive else "dead"
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


async def _metrics(server: Server, request: Request) -> Response:
    return Response(server.metrics.text(), media_type=CONTENT_TYPE)


_ROUTES: tuple[tuple[str, str, Route], ...] = (
    ("POST", "/v1/chat/completions", _chat),
    ("POST", "/v1/completions", _completion),
    ("GET", "/v1/models", _models),
    ("GET", "/v1/models/{model:path}", _model),
    ("POST", "/v1/load_lora_adapter", _load),
    ("POST", "/v1/unload_lora_adapter", _unload),
    ("GET", "/health", _health),
    ("GET", "/metrics", _metrics),
)


def build_app(server: Server) -> Any:
    """The application, guarded."""
    app = FastAPI(title="rankwise", docs_url=None, redoc_url=None, openapi_url=None)
    for method, path, route in _ROUTES:
        app.add_api_route(path, _told(server, path, route), methods=[method], response_model=None)
    app.add_exception_handler(HTTPException, _no_route)
    return Guard(app, server.door)


def _told(server: Server, path: str, route: Route) -> Callable[[Request], Awaitable[Response]]:
    """The route, whose every error is a body, and which is counted."""

    async def answered(request: Request) -> Response:
        try:
            response = await route(server, request)
        except RankwiseError as error:
            response = _refused(refusal(error), closing=server.door.closing)
        except Exception:
            _log.exception("%s failed", path)
            response = _refused(RefusedError(500, "the server failed; its log says where", code="internal_error"))
        server.metrics.requests.labels(path, str(response.status_code)).inc()
        return response

    return answered


def _refused(refused: RefusedError, *, closing: bool = False) -> Response:
    if closing and refused.status == 429:
        refused = RefusedError(503, "the server is being stopped", code="stopping", retry=5)
    return JSONResponse(refused.body(), refused.status, refused.headers)


async def _no_route(request: Request, error: Any) -> Response:
    said = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(RefusedError(error.status_code, said, code="no_route").body(), error.status_code, error.headers)
