"""Asks an endpoint for chat completions, and again where it fails for a moment. Knows nothing of images.

answer                              what is done
------                              ------------
a completion                        its text
refused, cut off by a content rule  AnswerError: the row's
400, 413, 422                       AnswerError: the row's
401, 403, 404, a redirect, ...      EndpointError: no row can succeed
429, no connection                  again; in the end EndpointError
408, 409, 5xx, no answer in time,   again; in the end a harmless request decides whose fault it is:
cut off, not a completion           AnswerError if that is answered, else EndpointError
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import json
import random
from collections.abc import Mapping
from typing import Any, NoReturn

import httpx2

from capfilt.errors import EndpointError
from capfilt.redaction import HIDDEN
from capfilt.spec import EndpointCard

LONGEST_PAUSE = 60.0
"""Seconds between two attempts, at the most, where the endpoint does not say."""

LONGEST_WAIT = 600.0
"""Seconds that an endpoint may ask to wait (Retry-After); a longer wait ends the run, which resumes when told to."""

MOST_BYTES = 2**20
"""Of an answer."""

_ROWS = (400, 413, 422)
_AGAIN = (408, 409, 425, 429)


class AnswerError(Exception):
    """The endpoint is well and does not caption this image."""


class _PassingError(Exception):
    """What may pass.

    Attributes:
        wait: seconds that the endpoint asks to wait, if it does.
        blameless: it is surely no row's fault.
    """

    def __init__(self, what: str, wait: float | None = None, blameless: bool = False) -> None:
        super().__init__(what)
        self.wait, self.blameless = wait, blameless


class Completions:
    """A client of one endpoint; all of it runs in one event loop.

    Args:
        key: sent as a bearer token, if there is one; kept out of every message.
        pause: seconds before the second attempt, about; then twice as long each time.
    """

    def __init__(self, card: EndpointCard, key: str | None, pause: float = 1.0) -> None:
        self._card, self._key, self._pause = card, key, pause
        self._url = f"{card.base_url}/chat/completions"
        self._slots = asyncio.Semaphore(card.concurrency)
        self._down: EndpointError | None = None
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(card.timeout),
            limits=httpx2.Limits(max_connections=card.concurrency, max_keepalive_connections=card.concurrency),
        )

    async def close(self) -> None:
        """Let go of all connections."""
        await self._client.aclose()

    async def check(self, harmless: Mapping[str, Any]) -> None:
        """Ask once for something that every caption could be.

        Raises:
            EndpointError: that fails.
        """
        try:
            await self.text(harmless, harmless)
        except AnswerError as error:
            raise self._dead(f"does not caption a plain image: {error}") from error

    async def text(self, body: Mapping[str, Any], harmless: Mapping[str, Any]) -> str:
        """The text of a completion.

        Args:
            body: the request.
            harmless: a request that fails only where all do.

        Raises:
            AnswerError: the endpoint answers others, but not this.
            EndpointError: it answers no one as it should; from then on, at once.
        """
        attempt = 0
        while True:
            try:
                return await self._once(body)
            except _PassingError as error:
                attempt += 1
                if attempt > self._card.retries or (error.wait or 0) > LONGEST_WAIT:
                    await self._blame(error, attempt, harmless)
                growing = min(LONGEST_PAUSE, self._pause * 2 ** (attempt - 1)) * random.uniform(0.5, 1.5)
                await asyncio.sleep(growing if error.wait is None else error.wait)

    async def _blame(self, error: _PassingError, attempts: int, harmless: Mapping[str, Any]) -> NoReturn:
        """Say whose fault it was that the last attempt failed, too."""
        what = f"{error} ({attempts} attempts)"
        too_long = (error.wait or 0) > LONGEST_WAIT
        if too_long:
            what = f"{what}; it asks to wait {error.wait:g} s"
        if error.blameless or too_long:
            raise self._dead(what) from error
        try:
            await self._once(harmless)
        except (_PassingError, AnswerError):
            raise self._dead(what) from error
        raise AnswerError(what) from error

    def _dead(self, what: str) -> EndpointError:
        self._down = EndpointError(
            f"captioner {self._card.name}: {self._card.base_url} {what}. What was finished is kept: start the "
            "endpoint, or mend the card, and run again"
        )
        return self._down

    async def _once(self, body: Mapping[str, Any]) -> str:
        async with self._slots:
            if self._down is not None:
                raise self._down
            try:
                async with asyncio.timeout(self._card.timeout):
                    status, headers, data = await self._post(body)
            except TimeoutError:
                raise _PassingError(f"gave no answer within {self._card.timeout:g} s") from None
            except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
                raise _PassingError(f"cannot be reached: {self._shown(error)}", blameless=True) from error
            except httpx2.TransportError as error:
                raise _PassingError(f"broke off: {self._shown(error)}") from error
            except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
                raise self._dead(f"cannot be asked: {self._shown(error)}") from error
        if status == 200:
            return self._read(data)
        said = f"answers {status}: {self._shown(data.decode('utf-8', 'replace'))}"
        if status in _ROWS:
            raise AnswerError(said)
        if status in _AGAIN or status >= 500:
            raise _PassingError(said, _wait(headers), blameless=status == 429)
        raise self._dead(said)

    async def _post(self, body: Mapping[str, Any]) -> tuple[int, httpx2.Headers, bytes]:
        data = bytearray()
        async with self._client.stream("POST", self._url, json=body) as response:
            async for part in response.aiter_bytes():
                data += part
                if len(data) > MOST_BYTES:
                    raise _PassingError(f"answers {response.status_code} with more than {MOST_BYTES} bytes")
            return response.status_code, response.headers, bytes(data)

    def _read(self, data: bytes) -> str:
        """The text that a completion holds."""
        try:
            (choice, *_) = json.loads(data)["choices"]
            message, reason = choice["message"], choice.get("finish_reason")
            text, refusal = message.get("content"), message.get("refusal")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = self._shown(data[:200].decode("utf-8", "replace"))
            raise _PassingError(f"answers what is no chat completion ({type(error).__name__}): {what}") from error
        if refusal or reason == "content_filter":
            raise AnswerError(f"refused: {self._shown(refusal or reason)}")
        if text is None:
            text = ""
        if not isinstance(text, str):
            raise _PassingError(f"answers a text that is {type(text).__name__}")
        return " ".join(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").split())

    def _shown(self, what: object) -> str:
        """For a message: one short line, without the key."""
        text = " ".join(str(what).split()) or type(what).__name__
        return (text.replace(self._key, HIDDEN) if self._key else text)[:300]


def _wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After asks to wait: a number, or a date (RFC 9110, section 10.2.3); None where it does not."""
    asked = headers.get("retry-after", "")
    try:
        return max(0.0, float(asked))
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(asked)
    except ValueError:
        return None
    return max(0.0, (until - datetime.datetime.now(until.tzinfo)).total_seconds())
