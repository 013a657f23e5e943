"""What stands before every route: who may ask, how much, and whether anything is taken at all.

A page in a browser on the same machine can send requests to a loopback address.  Where no key is asked for it is kept
out by the host's name (a page of another name that leads here: DNS rebinding) and, in `read`, by the content type: a
page may send that one to another origin only after it has asked, and that is not answered.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from rankwise.serving.wire import RefusedError

OPEN = ("/health",)  # told without a key: probes of load balancers have none


@dataclass
class Door:
    """Attributes:
    key: None lets everybody in.
    hosts: names under which it may be asked where there is no key; empty is any.
    most_bytes: of a body.
    seconds: in which a body has to be here.
    closing: whoever comes now is turned away.
    """

    key: str | None = None
    hosts: Collection[str] = ()
    most_bytes: int = 4 << 20
    seconds: float = 30.0
    closing: bool = False

    def check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raises:
        RefusedError: 401, 403, 413 or 503.
        """
        if path not in OPEN:
            self._check_key(headers.get(b"authorization", b""))
        if self.key is None and self.hosts:
            name = _host(headers.get(b"host", b"").decode("latin-1"))
            if name not in self.hosts:
                raise RefusedError(403, f"asked as {name!r}", code="wrong_host", hint="set --api-key to be asked so")
        if self.closing and path not in OPEN:
            raise RefusedError(503, "the server is being stopped", code="stopping", hint="ask another one", retry=5)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.most_bytes:
            raise self.too_large()

    def _check_key(self, given: bytes) -> None:
        if self.key is None:
            return
        kind, _, key = given.partition(b" ")
        fits = hmac.compare_digest(key.strip(), self.key.encode())
        if kind.lower() != b"bearer" or not fits:
            said = "wrong" if given else "missing"
            raise RefusedError(
                401, f"the API key is {said}", code="invalid_api_key", hint="Authorization: Bearer <key>"
            )

    def too_large(self) -> RefusedError:
        return RefusedError(413, f"the body has more than {self.most_bytes} bytes", code="body_too_large")

    async def read(self, request: Request) -> bytes:
        """The body of a request.

        Raises:
            RefusedError: 408, 413 or 415.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RefusedError(
                415, f"the content type is {kind or 'missing'}", code="media_type", hint="application/json"
            )
        try:
            return await asyncio.wait_for(self._read(request), self.seconds)
        except (TimeoutError, asyncio.TimeoutError):  # one and the same since Python 3.11
            raise RefusedError(408, f"the body was not here in {self.seconds:g} seconds", code="timeout") from None
        except ClientDisconnect:
            raise RefusedError(400, "the body was cut off", code="cut_off") from None

    async def _read(self, request: Request) -> bytes:
        found = bytearray()
        async for part in request.stream():
            found += part
            if len(found) > self.most_bytes:
                raise self.too_large()
        return bytes(found)


class Guard:
    """ASGI: a `Door` before an application."""

    def __init__(self, app: Any, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            try:
                self.door.check(scope["path"], dict(scope["headers"]))
            except RefusedError as refused:
                answer = JSONResponse(refused.body(), refused.status, {**refused.headers, "Connection": "close"})
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own; a name other than localhost may be anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    name = header.strip().lower()
    return name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
