"""HTTP for the relying party: it asks the OpenID provider, over TLS that the grid's CA vouches for, and nobody else."""

from __future__ import annotations

import ssl
from types import TracebackType
from typing import Self

import aiohttp

from secfunet.openid.effects import HttpRequest, HttpResponse
from secfunet.openid.errors import HttpFailedError


class OpenIdHttp:
    """``fetch`` for secfunet.openid.effects.drive: follows no redirect, keeps no cookie, and reads no more than it was told to."""

    def __init__(self, context: ssl.SSLContext, *, timeout: float) -> None:
        self._context = context
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._context, limit=16),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self._timeout),
            trust_env=False,
            auto_decompress=False,
            headers={"Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def fetch(self, request: HttpRequest) -> HttpResponse:
        """One exchange. Raises HttpFailedError."""
        if self._session is None:
            raise RuntimeError("the HTTP client is not open")
        try:
            async with self._session.request(
                request.method, request.url, headers=request.headers, data=request.body or None, allow_redirects=False
            ) as response:
                body = bytearray()
                async for chunk in response.content.iter_chunked(16384):
                    body += chunk
                    if len(body) > request.max_body:
                        raise HttpFailedError(f"the answer is longer than {request.max_body} bytes")
                return HttpResponse(response.status, dict(response.headers), bytes(body))
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise HttpFailedError(f"{request.method} {request.url:.100}: {error or type(error).__name__}") from error
