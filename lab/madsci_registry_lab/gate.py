"""What every request passes: who sends it, how large it may be; and what every answer carries.

It is a class of routes, so that a router that is mounted in another program has it too. Each answer of such a route
says by a header that it comes from a lab registry: a 404 without it means nothing. A refusal is a RegistryError, whose
`code` a program reads and whose `detail` (FastAPI's word) a person does.

Without tokens the loopback address is what keeps strangers out. A page of the Web in a browser on this host is one: it
may send any request to 127.0.0.1 that needs no question beforehand (so none with a body of JSON), and reads answers
where its own name leads here (so the Host that it asks for is not ours).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Message, Receive

from madsci_registry.errors import InternalError, InvalidError, PermissionDeniedError, RegistryError
from madsci_registry_lab.settings import is_loopback
from madsci_registry_lab.tokens import TokenFile, token_in

log = logging.getLogger(__name__)

MARK = "X-MADSci-Lab-Registry"
MARK_VALUE = "1"
BODY_MAX_BYTES = 1 << 20
"""A frame of the daemon's own protocol; holds the locks of 10,000 names in one keepalive."""
DRAINED_MAX_BYTES = 8 << 20
"""So much of a request that is too long is read and forgotten: its sender does not read our answer before."""
STATUS = {
    "held": 409, "not_found": 404, "name_taken": 409, "wrong_type": 409, "invalid": 422, "permission_denied": 403,
    "too_large": 413, "session_required": 409, "lock_lost": 409, "conflict": 409, "compacted": 410, "no_space": 507,
    "unavailable": 503, "internal": 500,
}  # fmt: skip
"""The HTTP status of each code that a lab answers."""

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Refusal(BaseModel):
    """What an error is answered with; its facts are further fields."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    detail: str
    """For people."""
    code: str
    """For programs."""


class Gate:
    """The gate of one lab registry. Used by one event loop."""

    def __init__(self, tokens: TokenFile | None) -> None:
        """`tokens` None: whoever reaches it may all, under any host's name."""
        self._tokens = tokens
        self.only_loopback = False
        """Let nobody in who asks for another host than this one by a loopback address."""
        self.answers: Counter[tuple[str, str, str]] = Counter()
        """How many answers there were, by method, route and status."""

    def router(self, prefix: str = "") -> APIRouter:
        """Return a router whose routes this gate guards, and OpenAPI tells so."""
        bearer = [] if self._tokens is None else [Depends(HTTPBearer(auto_error=False))]
        refusals: dict[int | str, dict[str, Any]] = {"4XX": {"model": Refusal}, "5XX": {"model": Refusal}}
        return APIRouter(prefix=prefix, route_class=self._route_class(), responses=refusals, dependencies=bearer)

    def _route_class(self) -> type[APIRoute]:
        gate = self

        class Guarded(APIRoute):
            def get_route_handler(self) -> Handler:
                handler, route = super().get_route_handler(), self

                async def answer(request: Request) -> Response:
                    return await gate.answer(request, handler, route)

                return answer

        return Guarded

    async def answer(self, request: Request, handler: Handler, route: APIRoute) -> Response:
        """Let a request through, or not, and mark the answer."""
        try:
            self._refuse_pages(request)
            request.state.host = None if "open" in route.tags else self._host(request)
            response = await handler(Request(request.scope, _limited(request)))
        except RegistryError as error:
            response = refusal(error)
        except RequestValidationError as error:
            response = refusal(_invalid(error))
        except (HTTPException, StarletteHTTPException) as error:
            code = {401: "permission_denied", 413: "too_large"}.get(error.status_code, "invalid")
            body = {"detail": error.detail, "code": code}
            response = JSONResponse(body, error.status_code, error.headers)
        except Exception:
            log.exception("a request has failed: %s %s", request.method, route.path)
            response = refusal(InternalError("a fault of the lab registry; its log has more"))
        response.headers[MARK] = MARK_VALUE
        self.answers[request.method, route.path, str(response.status_code)] += 1
        return response

    def _refuse_pages(self, request: Request) -> None:
        """Raises PermissionDeniedError, InvalidError: a page of the Web may have sent it."""
        if self.only_loopback and not is_loopback(_name_in(request.headers.get("host", ""))):
            reason = "this lab has no tokens, and is asked by a loopback address or as localhost only"
            raise PermissionDeniedError(f"Host: {reason}")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind != "application/json":
            raise InvalidError("Content-Type: must be application/json", field="Content-Type", reason="must be JSON")

    def _host(self, request: Request) -> str | None:
        if self._tokens is None:
            return None
        token = token_in(request.headers.get("authorization", ""))
        host = self._tokens.host_of(token) if token else None
        if host is None:
            raise HTTPException(401, "a token of this lab is needed", {"WWW-Authenticate": "Bearer"})
        return host


def sender(request: Request, host: str) -> str:
    """Return the host that sends a request, which says that it is `host`.

    Raises:
        PermissionDeniedError: its token is another host's.
    """
    known: str | None = request.state.host
    if known is not None and known != host:
        raise PermissionDeniedError(f"this token is that of {known!r}, not of {host!r}")
    return host


def refusal(error: RegistryError) -> JSONResponse:
    """Return the answer that an error is."""
    return JSONResponse({"detail": error.message, **error.to_wire()}, STATUS[error.code])


def _name_in(host: str) -> str:
    """Return the name or address in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _invalid(error: RequestValidationError) -> InvalidError:
    """Name the field, and say nothing of what was sent: that may not even be text."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or "body"
    field = field.encode("utf-8", "backslashreplace").decode()[:200]
    return InvalidError(f"{field}: {first['msg']}", field=field, reason=first["msg"])


def _limited(request: Request) -> Receive:
    """Return the stream of a request, which breaks off where it is too long."""
    told = request.headers.get("content-length", "0")
    left = BODY_MAX_BYTES

    async def receive() -> Message:
        nonlocal left
        message = await request.receive()
        left -= len(message.get("body", b""))
        if left < 0 or told.isdecimal() and len(told) < 20 and int(told) > BODY_MAX_BYTES:
            while message.get("more_body") and left > -DRAINED_MAX_BYTES:
                message = await request.receive()
                left -= len(message.get("body", b""))
            raise HTTPException(413, f"a request has at most {BODY_MAX_BYTES} bytes", {"Connection": "close"})
        return message

    return receive
