"""What the relying party asks of the world: HTTP exchanges, as values. Redirects are its own business: a shell follows none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Generator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from secfunet.openid.errors import FetchRefusedError, HttpFailedError, OpenIdFormatError
from secfunet.openid.realm import WebUrl, parse_url

MAX_BODY = 65536

Result = TypeVar("Result")


@dataclass(frozen=True)
class HttpRequest:
    """One exchange to make. The shell must refuse an answer whose body is longer than ``max_body`` bytes (HttpFailedError)."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)
    max_body: int = MAX_BODY


@dataclass(frozen=True)
class HttpResponse:
    """What came back; header names are compared without regard to case."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)

    def header(self, name: str) -> str:
        """The header's value, or ""."""
        return next((value for key, value in self.headers.items() if key.lower() == name.lower()), "")

    @property
    def media_type(self) -> str:
        return self.header("content-type").partition(";")[0].strip().lower()


Exchange = Generator[HttpRequest, HttpResponse, Result]


class FetchPolicy:
    """Where discovery may lead: to https, and to the origins that the administrator named; to nothing else, whatever a document says.

    ``unsafe_allow_http`` admits origins that are http: for tests on the loopback interface.
    """

    def __init__(self, origins: Collection[str], *, unsafe_allow_http: bool = False) -> None:
        self._schemes = {"https", "http"} if unsafe_allow_http else {"https"}
        self._origins = frozenset(parse_url(origin).origin for origin in origins)
        if not self._origins:
            raise ValueError("a fetch policy without origins admits nothing")

    def check(self, untrusted_url: str) -> WebUrl:
        """Raises FetchRefusedError unless this URL may be asked."""
        try:
            url = parse_url(untrusted_url)
        except OpenIdFormatError as error:
            raise FetchRefusedError(untrusted_url, str(error)) from None
        if url.scheme not in self._schemes:
            raise FetchRefusedError(untrusted_url, "it is not https")
        if url.origin not in self._origins:
            raise FetchRefusedError(untrusted_url, "its origin is not configured")
        return url


async def drive(exchange: Exchange[Result], fetch: Callable[[HttpRequest], Awaitable[HttpResponse]]) -> Result:
    """Runs an exchange over an asynchronous HTTP client. ``fetch`` raises HttpFailedError, which the exchange may outlive."""
    try:
        request = next(exchange)
        while True:
            try:
                response = await fetch(request)
            except HttpFailedError as error:
                request = exchange.throw(error)
            else:
                request = exchange.send(response)
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        exchange.close()


def drive_blocking(exchange: Exchange[Result], fetch: Callable[[HttpRequest], HttpResponse]) -> Result:
    """The same over a blocking HTTP client."""
    try:
        request = next(exchange)
        while True:
            try:
                response = fetch(request)
            except HttpFailedError as error:
                request = exchange.throw(error)
            else:
                request = exchange.send(response)
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        exchange.close()
