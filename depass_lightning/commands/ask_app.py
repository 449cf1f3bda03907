"""The ask page's web application: a page and three calls, for one person on one machine.

Every request needs the token of the address and a `Host` header that names this machine, so that neither
other users nor pages of other sites reach the model. Nothing allows other origins.
"""

import functools
import hmac
import json
import logging
from collections.abc import Callable
from typing import Any

import anyio
from anyio import to_thread
from starlette.applications import Starlette
from starlette.datastructures import Headers, QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from depass_lightning.commands.ask import AskedModel
from depass_lightning.errors import DePassError
from depass_lightning.reports.ask_page import ask_html

log = logging.getLogger(__name__)

TOKEN_HEADER = "x-depass-token"
MAX_BODY = 2_000_000  # bytes of a request; a model's context is checked by its tokens
CLOSED = 499  # nobody reads this answer
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",  # the page's own policy allows one script, by its hash
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def ask_app(answers: AskedModel, token: str, port: int) -> ASGIApp:
    """Return the application.

    Args:
        answers: answers the questions.
        token: what a request has to know.
        port: the port that it is served on.
    """
    page = ask_html(answers.name)
    calls = Calls()

    async def show(_request: Request) -> Response:
        return HTMLResponse(page)

    routes = [
        Route("/", show),
        *(
            Route(f"/{work.__name__}", functools.partial(calls.answer, work), methods=["POST"])
            for work in (answers.scores, answers.change, answers.page)
        ),
    ]
    return Guard(Starlette(routes=routes), token, port)


class Guard:
    """Refuses requests of anybody but the page.

    Args:
        app: the application.
        token: what a request has to know.
        port: the port that it is served on.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app = app
        self.token = token.encode()
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":  # no WebSockets
            return
        reason = self._reason(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    *((name.encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        app = self.app if reason is None else JSONResponse({"error": reason}, 403)
        await app(scope, receive, send_with_headers)

    def _reason(self, scope: Scope) -> str | None:
        """Return why a request is refused, or None."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if host not in self.hosts:  # a name of another site that resolves to this machine
            return "this host is not served"
        if headers.get("origin", f"http://{host}") != f"http://{host}":
            return "other sites are not served"
        known = headers.get(TOKEN_HEADER) if scope["method"] == "POST" else None
        known = QueryParams(scope["query_string"]).get("token", "") if known is None else known
        if not hmac.compare_digest(known.encode(), self.token):
            return "the address lacks the token; open the address that the terminal shows"
        return None


class Calls:
    """Runs the model for one request at a time.

    A request whose client has gone is dropped when its turn comes; one that is being computed is finished,
    which is a matter of one prompt.
    """

    def __init__(self) -> None:
        self.turn = anyio.Lock()

    async def answer(self, work: Callable[[dict[str, Any]], Any], request: Request) -> Response:
        """Compute an answer in a thread; an error becomes its text.

        Args:
            work: takes the question and returns JSON data, or a page as text.
            request: the request; its body is the question.
        """
        try:
            asked = await _body(request)
            async with self.turn:
                if await request.is_disconnected():
                    return Response(status_code=CLOSED)
                result = await to_thread.run_sync(work, asked)
            return HTMLResponse(result) if isinstance(result, str) else JSONResponse(result)
        except ClientDisconnect:
            return Response(status_code=CLOSED)
        except DePassError as error:
            return JSONResponse({"error": str(error)}, 400)
        except Exception:
            log.exception("a question of the ask page failed")
            return JSONResponse({"error": "this failed unexpectedly; the terminal has the details"}, 500)


async def _body(request: Request) -> dict[str, Any]:
    """Return a request's JSON object."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise DePassError(f"the question is larger than {MAX_BODY:,} bytes; shorten the prompt")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DePassError("the question is not JSON") from error
    if not isinstance(asked, dict):
        raise DePassError("the question is not a JSON object")
    return asked
