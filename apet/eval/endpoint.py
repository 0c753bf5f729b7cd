"""A client for OpenAI-compatible chat endpoints: messages in, text and token counts out.

Standard library only. Requests that fail on the way or because the server is busy (no connection, timeout, 408, 429,
5xx) are repeated with growing waits; every other refusal is an `EndpointError` with the server's own words. The key is
read from an environment variable and sent nowhere but to the given server: redirects are refused, over plain http it
goes to this machine only, and requests to this machine take no proxy.

Why not the `openai` package: with it (3.57) this file was as long, 416 lines against 421, because addresses, keys,
waits, broken streams and the server's words have to be looked after either way. And it sends what the variables
OPENAI_ORG_ID, OPENAI_PROJECT_ID and OPENAI_CUSTOM_HEADERS hold, and facts about this machine, to whichever server is
asked; that would have to be taken out of every request again.
"""

import collections
import email.utils
import http.client
import ipaddress
import json
import math
import os
import random
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

KEY_VARIABLE = "APET_API_KEY"
# OpenAI's key is for the one server that a user named as the judge (`llava.eval.eval_video_qa`), never for another.
JUDGE_KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the server asks for
_BUSY = (408, 429)  # statuses worth a repetition, beside 5xx
_QUOTED = 500  # characters of a server's message that go into ours

Message = Mapping[str, Any]


class EndpointError(ValueError):
    """A request that failed for good.

    Attributes:
        status: HTTP status, None where there was no answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _Transient(Exception):
    """A failure worth a repetition."""

    def __init__(self, message: str, status: int | None = None, wait: float | None = None) -> None:
        super().__init__(message)
        self.status, self.wait = status, wait


@dataclass(frozen=True)
class Completion:
    """One answer of a server.

    Attributes:
        text: As generated; "" if the server sent none.
        prompt_tokens: Tokens of the prompt as the server counts them; None if it does not say.
        completion_tokens: The same for the answer.
        finish_reason: "stop", "length", ...; None if the server does not say.
        model: Name of the model that answered, by the server.
        seconds: From sending the request to the end of the answer, for the attempt that succeeded.
        first_token_seconds: The same to the first piece of text; None without streaming, or if there was no text.
        attempts: Requests it took.
        usage: The server's complete usage object.
    """

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    finish_reason: str | None
    model: str | None
    seconds: float
    first_token_seconds: float | None = None
    attempts: int = 1
    usage: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Endpoint:
    """A server, and how to talk to it. Instances are immutable and may be used from several threads.

    Attributes:
        url: Base URL such as http://localhost:8000/v1; a URL without a path gets "/v1".
        concurrency: Requests of `complete_all` under way at a time.
        timeout: Seconds without a byte from the server after which an attempt has failed.
        attempts: Requests made before giving up.
        first_wait: Seconds before the second attempt; doubles up to a minute, with jitter. A Retry-After header counts
            if it asks for more.
        key_variable: Environment variable that holds the key, if the server wants one. Read at every request.
    """

    url: str
    concurrency: int = 8
    timeout: float = 600.0
    attempts: int = 6
    first_wait: float = 1.0
    key_variable: str = KEY_VARIABLE

    def __post_init__(self) -> None:
        parts = _split(self.url)
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            shown = repr(self.url) if "@" not in self.url else "with a user name or password in it"
            raise ValueError(f"server URL {shown} must look like http://localhost:8000/v1")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError(
                f"server URL {parts.scheme}://{parts.hostname}...: user names, passwords, ? and # do not belong into "
                f"it; put the key into the environment variable {self.key_variable}"
            )
        path = parts.path.rstrip("/") or "/v1"
        object.__setattr__(self, "url", urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", "")))
        for name, least in (("concurrency", 1), ("attempts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least {least}")
        if not 0 < self.timeout < math.inf or not 0 <= self.first_wait < math.inf:
            raise ValueError(
                f"timeout={self.timeout!r} must be positive, first_wait={self.first_wait!r} not negative, both finite"
            )

    def models(self) -> list[dict[str, Any]]:
        """What the server says about the models it serves; each has an "id".

        Raises:
            EndpointError: No answer, or not of an OpenAI-compatible server.
        """
        reply = self.get("/models")
        listed = reply.get("data") if isinstance(reply, dict) else None
        if not isinstance(listed, list) or not all(isinstance(one, dict) and "id" in one for one in listed):
            raise EndpointError(f"{self.url}/models did not list models: {_quote(reply)}; is it OpenAI-compatible?")
        return listed

    def model_id(self, wanted: str | None = None) -> str:
        """The id of the model to ask for: `wanted`, which must be served, or the only one there is.

        Raises:
            EndpointError: The server serves another model, or several and none is wanted.
        """
        served = [one["id"] for one in self.models()]
        if wanted is not None and wanted not in served:
            raise EndpointError(
                f"{self.url} does not serve a model {wanted!r}; it serves: {', '.join(served) or 'none'}"
            )
        if wanted is None and len(served) != 1:
            raise EndpointError(f"{self.url} serves {len(served)} models, name one of them: {', '.join(served)}")
        return served[0] if wanted is None else wanted

    def get(self, path: str) -> Any:
        """The JSON document below the base URL.

        Raises:
            EndpointError: No answer, a refusal, or no JSON.
        """
        return self._repeat(lambda: self._json(path, None))[0]

    def complete(self, messages: Sequence[Message], *, model: str, stream: bool = False, **options: Any) -> Completion:
        """Ask once.

        Args:
            messages: The conversation as the chat API takes it: mappings with "role" and "content".
            model: Id of the model.
            stream: Receive the answer piece by piece, which times the first token.
            **options: Further fields of the request: temperature, max_tokens, seed, ...

        Raises:
            EndpointError: The server refuses the request, or stayed unreachable or busy for all attempts.
        """
        body = {"model": model, "messages": list(messages), **options}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        ask = self._streamed if stream else self._whole
        answer, attempts = self._repeat(lambda: ask(body))
        return replace(answer, attempts=attempts)

    def complete_all(
        self, conversations: Iterable[Sequence[Message]], *, model: str, stream: bool = False, **options: Any
    ) -> Iterator[Completion]:
        """Ask for several answers, at most `concurrency` at a time; yields them in order as soon as they are there.

        Args:
            conversations: One list of messages per answer. An iterator is read only as far as there is work to do.
            model: Id of the model.
            stream: As in `complete`.
            **options: As in `complete`.

        Raises:
            EndpointError: As `complete`, at the first conversation that failed; later ones are not asked any more.
        """
        ahead = 2 * self.concurrency  # bounds what waits behind a slow answer
        waiting: collections.deque[Future[Completion]] = collections.deque()
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint") as pool:
            try:
                for messages in conversations:
                    waiting.append(pool.submit(self.complete, messages, model=model, stream=stream, **options))
                    while waiting and (len(waiting) >= ahead or waiting[0].done()):
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _repeat(self, request: Callable[[], Any]) -> tuple[Any, int]:
        """The result of `request` and the attempts it took."""
        for attempt in range(1, self.attempts + 1):
            try:
                return request(), attempt
            except _Transient as problem:
                if attempt == self.attempts:
                    tries = f"{attempt} attempts" if attempt > 1 else "1 attempt"
                    raise EndpointError(f"{self.url} failed after {tries}: {problem}", problem.status) from None
                wait = min(self.first_wait * 2 ** (attempt - 1), LONGEST_WAIT)
                wait *= 0.5 + 0.5 * random.random()  # so that requests refused together do not return together
                time.sleep(max(wait, min(problem.wait or 0.0, LONGEST_WAIT)))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _whole(self, body: dict[str, Any]) -> Completion:
        start = time.perf_counter()
        reply = self._json("/chat/completions", body)
        seconds = time.perf_counter() - start
        try:
            choice = reply["choices"][0]
            text, finish = choice["message"].get("content"), choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise EndpointError(f"{self.url} answered without a message: {_quote(reply)}") from None
        return _completion(text, finish, reply.get("model"), reply.get("usage"), seconds)

    def _streamed(self, body: dict[str, Any]) -> Completion:
        start = time.perf_counter()
        pieces: list[str] = []
        finish = model = usage = first = None
        done = False
        with self._open("/chat/completions", body) as response:
            for event in self._events(response):
                if event is None:
                    done = True
                    break
                if event.get("error"):
                    self._refuse(_status(event["error"]), event)
                model, usage = event.get("model") or model, event.get("usage") or usage
                for choice in event.get("choices") or ():
                    finish = choice.get("finish_reason") or finish
                    piece = (choice.get("delta") or {}).get("content")
                    if piece:
                        first = first if first is not None else time.perf_counter() - start
                        pieces.append(piece)
        if not done and finish is None:
            raise _Transient("the answer broke off")
        return _completion("".join(pieces), finish, model, usage, time.perf_counter() - start, first)

    def _events(self, response: Any) -> Iterator[dict[str, Any] | None]:
        """The JSON objects of a stream of server-sent events; None for its end mark."""
        try:
            for line in response:
                if not line.startswith(b"data:"):
                    continue  # blank lines between events, comments that keep the connection open
                data = line[len(b"data:") :].strip()
                if data == b"[DONE]":
                    yield None
                    return
                try:
                    yield json.loads(data)
                except ValueError:
                    raise EndpointError(f"{self.url} streamed something that is not JSON: {_quote(data)}") from None
        except (OSError, http.client.HTTPException) as error:
            raise _broken_off(error) from None

    def _json(self, path: str, body: dict[str, Any] | None) -> Any:
        with self._open(path, body) as response:
            try:
                text = response.read()
            except (OSError, http.client.HTTPException) as error:
                raise _broken_off(error) from None
        try:
            return json.loads(text)
        except ValueError:
            raise EndpointError(
                f"{self.url}{path} answered with something that is not JSON: {_quote(text)}; the base URL usually ends "
                "in /v1"
            ) from None

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        """The response to a request; a POST if there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Accept": "application/json", **self._key()})
        if data is not None:
            request.add_header("Content-Type", "application/json")
        try:
            return (_DIRECT if self._is_loopback else _OPENER).open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                self._refuse(error.code, _reply(error), error.headers)
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise EndpointError(f"{self.url}: the server's certificate cannot be trusted: {error.reason}") from None
            raise _Transient(f"no connection: {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Transient(f"no answer: {str(error) or type(error).__name__}") from None

    def _refuse(self, status: int | None, reply: Any, headers: Any = None) -> None:
        """Raise for a status that is no success, or for an error inside a stream."""
        said = f"status {status}: {_quote(reply)}" if status else _quote(reply)
        if status is None or status in _BUSY or status >= 500:
            raise _Transient(said, status, _retry_after(headers))
        if 300 <= status < 400:
            said = f"it redirects to {headers.get('Location')}; give that address, keys are not sent on"
        elif status in (401, 403):
            state = "is set" if os.environ.get(self.key_variable) else "is not set"
            said += f" (the key comes from the environment variable {self.key_variable}, which {state})"
        raise EndpointError(f"{self.url} refused the request, {said}", status)

    @property
    def _is_loopback(self) -> bool:
        """Whether requests stay on this machine."""
        host = urllib.parse.urlsplit(self.url).hostname
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def _key(self) -> dict[str, str]:
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise EndpointError(f"the key in {self.key_variable} has characters that cannot be sent")
        if key and self.url.startswith("http://") and not self._is_loopback:
            raise EndpointError(
                f"the key in {self.key_variable} would travel unencrypted to {self.url}; use https, reach the server "
                f"through a tunnel (ssh -L 8000:HOST:8000, http://localhost:8000), or unset {self.key_variable}"
            )
        return {"Authorization": f"Bearer {key}"} if key else {}


def _split(url: str) -> urllib.parse.SplitResult | None:
    """The parts of a URL; None for one with characters, brackets or a port that no URL has."""
    try:
        parts = urllib.parse.urlsplit(url)
        usable = url.isascii() and url.isprintable() and " " not in url and parts.port != 0
        return parts if usable else None
    except ValueError:
        return None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves redirects to `_refuse`: following one would send the key to another server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)
_DIRECT = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))


def _broken_off(error: Exception) -> _Transient:
    return _Transient(f"the answer broke off: {str(error) or type(error).__name__}")


def _completion(
    text: Any, finish: Any, model: Any, usage: Any, seconds: float, first: float | None = None
) -> Completion:
    """What a server said, as the answer of one attempt."""
    usage = usage or {}
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return Completion(text or "", *counts, finish, model, seconds, first, usage=usage)


def _reply(error: urllib.error.HTTPError) -> Any:
    """What the server said with a refusal: its JSON, or the text."""
    try:
        text = error.read()
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        return json.loads(text)
    except ValueError:
        return text or error.reason


def _status(error: Any) -> int | None:
    """The status inside an error object of a stream, if it has one."""
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else None


def _retry_after(headers: Any) -> float | None:
    """Seconds that a Retry-After header asks for: a number or a date."""
    text = headers.get("Retry-After") if headers is not None else None
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _quote(reply: Any) -> str:
    """The human part of a reply, shortened."""
    while isinstance(reply, dict) and any(key in reply for key in ("error", "message", "detail")):
        reply = next(reply[key] for key in ("error", "message", "detail") if key in reply)
    if isinstance(reply, bytes):
        reply = reply.decode(errors="replace")
    text = " ".join((reply if isinstance(reply, str) else json.dumps(reply)).split())
    return text if len(text) <= _QUOTED else text[:_QUOTED] + "..."
