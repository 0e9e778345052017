"""Plain HTTP on the loopback interface: our provider, a provider of python3-openid, and a client that follows no redirect."""

from __future__ import annotations

import contextlib
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from secfunet.openid.discovery import SERVICE_SIGNON, XRDS_CONTENT_TYPE, XRDS_LOCATION, html_document, xrds_document
from secfunet.openid.effects import HttpRequest, HttpResponse
from secfunet.openid.errors import HttpFailedError
from secfunet.openid.form import decode_form, decode_query
from secfunet.openid.provider import OpenIdProvider
from secfunet.openid.store import MemoryStore

Answer = tuple[int, Mapping[str, str], bytes]
HOW = ("xrds", "header", "meta", "link")  # the ways of discovery


@contextlib.contextmanager
def serving(answer: Callable[[str, str, bytes], Answer]) -> Iterator[str]:
    """Serves ``answer(method, path, body)`` in a thread; gives the origin."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers["Content-Length"])))

        def _answer(self, body: bytes) -> None:
            status, headers, content = answer(self.command, self.path, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class OurProvider:
    """Our provider with one user, alice, who is always logged in. Identifiers: /{one of HOW}/alice; the OP's own: /."""

    origin: str = ""
    requests: list[dict[str, str]] = field(default_factory=list)
    provider: OpenIdProvider = field(init=False)

    def start(self, origin: str) -> None:
        self.origin = origin
        self.provider = OpenIdProvider(f"{origin}/openid", MemoryStore())

    def identifier(self, how: str = "xrds") -> str:
        return f"{self.origin}/{how}/alice"

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        endpoint = f"{self.origin}/openid"
        where = path.partition("?")[0]
        if where == "/openid" and method == "POST":
            params = decode_form(body)
            self.requests.append(params)
            direct = self.provider.direct(params, over_tls=False)
            return direct.status, {"Content-Type": direct.content_type}, direct.body
        if where == "/openid":
            params = decode_query(path)
            self.requests.append(params)
            request = self.provider.parse_checkid(params)
            if request.immediate:
                return 303, {"Location": self.provider.setup_needed(request)}, b""
            who = self.identifier() if request.provider_chooses else request.claimed_id
            return 303, {"Location": self.provider.positive_assertion(request, who)}, b""
        signon = xrds_document(endpoint, service_type=SERVICE_SIGNON)
        documents: dict[str, Answer] = {
            "/": (200, {"Content-Type": XRDS_CONTENT_TYPE}, xrds_document(endpoint)),
            "/signon": (200, {"Content-Type": XRDS_CONTENT_TYPE}, signon),
            "/xrds/alice": (200, {"Content-Type": XRDS_CONTENT_TYPE}, signon),
            "/header/alice": (200, {"Content-Type": "text/html", XRDS_LOCATION: f"{self.origin}/signon"}, b"<p>alice"),
            "/meta/alice": (
                200,
                {"Content-Type": "text/html"},
                html_document(xrds_location=f"{self.origin}/signon"),
            ),
            "/link/alice": (200, {"Content-Type": "text/html"}, html_document(endpoint_url=endpoint)),
        }
        return documents.get(where, (404, {}, b""))


class TheirProvider:
    """python3-openid's provider with one user, alice, who is always logged in."""

    def __init__(self) -> None:
        self.origin = ""
        self.requests: list[dict[str, str]] = []

    def start(self, origin: str) -> None:
        from openid.server.server import Server
        from openid.store.memstore import MemoryStore as TheirStore

        self.origin = origin
        self.server = Server(TheirStore(), f"{origin}/openid")

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        where = path.partition("?")[0]
        if where != "/openid":
            kind = "server" if where == "/" else "signon"
            document = f"""<?xml version="1.0"?>
                <xrds:XRDS xmlns:xrds="xri://$xrds" xmlns="xri://$xrd*($v*2.0)"><XRD><Service>
                <Type>http://specs.openid.net/auth/2.0/{kind}</Type><URI>{self.origin}/openid</URI>
                </Service></XRD></xrds:XRDS>""".strip()
            return 200, {"Content-Type": XRDS_CONTENT_TYPE}, document.encode()
        params = decode_form(body) if method == "POST" else decode_query(path)
        self.requests.append(params)
        request = self.server.decodeRequest(params)
        if request.mode == "checkid_setup":
            alice = f"{self.origin}/id/alice"
            response = request.answer(True, identity=alice, claimed_id=alice)
        elif request.mode == "checkid_immediate":
            response = request.answer(False)
        else:
            response = self.server.handleRequest(request)
        encoded = self.server.encodeResponse(response)
        content = encoded.body.encode() if isinstance(encoded.body, str) else encoded.body
        return encoded.code, dict(encoded.headers), content


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))


def fetch(request: HttpRequest) -> HttpResponse:
    """One exchange, redirects not followed: for drive_blocking."""
    asked = urllib.request.Request(  # noqa: S310 - the policy of the relying party has checked the URL
        request.url, data=request.body or None, headers=dict(request.headers), method=request.method
    )
    try:
        with _opener.open(asked, timeout=10) as response:
            return HttpResponse(response.status, dict(response.headers), response.read(request.max_body + 1))
    except urllib.error.HTTPError as error:
        return HttpResponse(error.code, dict(error.headers), error.read(request.max_body + 1))
    except OSError as error:
        raise HttpFailedError(str(error)) from error


def location_of(url: str) -> str:
    """Where a user is sent who opens ``url``."""
    return fetch(HttpRequest("GET", url)).header("location")
