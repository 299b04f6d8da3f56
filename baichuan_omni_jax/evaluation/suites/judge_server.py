"""A judge's server: an OpenAI-compatible URL that is asked for one reply at a time, and what may go wrong with it.

Whatever a server does, a caller sees a text or one JudgeError in a sentence: errors, redirects, broken connections,
replies that trickle, do not end or are no JSON.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baichuan_omni_jax.errors import ConfigError

REPLY_BYTES = 1 << 24  # of a reply at most
_DAY = 86400  # seconds


@dataclass(frozen=True, kw_only=True)
class JudgeServer:
    """An OpenAI-compatible server of chat completions.

    Attributes:
        url: up to `/v1`, or of `chat/completions` itself.
        model: its name there.
        key: the environment variable that holds the key; unset or empty: none is sent.
        timeout: seconds that one reply may take.
        tries: how often a request is made that fails for a reason that may pass.
        pause: seconds before the second try, doubled before each further one.
        at_once: requests at a time.
    """

    url: str
    model: str
    key: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    tries: int = 4
    pause: float = 1.0
    at_once: int = 8

    def check(self) -> None:
        """Raises ConfigError where no request could be made: an address, a time or a key that is none."""
        try:
            place = urllib.parse.urlsplit(self.url)
            # Reading the port checks it.
            usable = bool(place.hostname) and (place.port is None or place.port > 0)
        except ValueError:
            usable = False
        if not usable or not self.url.isascii() or not self.url.isprintable() or " " in self.url:
            raise ConfigError(f"the judge's URL {self.url!r} is none that can be asked: http://HOST:PORT/v1")
        if not 0 < self.timeout <= _DAY:
            raise ConfigError(f"a judge's reply may take from above 0 to {_DAY} seconds, not {self.timeout:g}")
        # A header takes no line end, which an error would show with the key.
        key = self._key
        if not key.isascii() or not key.isprintable():
            raise ConfigError(f"${self.key} is no key: it has characters that no request may have")

    @property
    def _key(self) -> str:
        # Keys that were read from a file end in a line end.
        return os.environ.get(self.key, "").strip()

    def ask(self, messages: Sequence[Mapping[str, str]], seed: int | None = None) -> str:
        """Returns the reply's text.

        Args:
            messages: of the request.
            seed: of a reply that is sampled; None: the likeliest is wanted.

        Raises:
            JudgeError: the server does not answer, or not with a chat completion.
        """
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), "temperature": 0.0}
        if seed is not None:
            body |= {"temperature": 0.7, "seed": seed}
        # What may pass is tried again, after pauses that grow: a server that restarts needs some seconds.
        for number in range(self.tries):
            try:
                return self._post(body)
            except JudgeError as error:
                if error.final or number + 1 == self.tries:
                    raise
                time.sleep(error.wait or self.pause * 2**number)
        raise AssertionError("tries must be at least 1")

    def _post(self, body: Mapping[str, Any]) -> str:
        url = self.url.rstrip("/")
        url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        reply = self.fetch(url, json.dumps(body).encode())
        try:
            text = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise JudgeError(f"the judge {url} answers something that is no chat completion", False) from error
        if not isinstance(text, str):
            raise JudgeError(f"the judge {url} answers without text", False)
        # JSON may hold half a character, which no file takes.
        return text.encode("utf-8", "replace").decode("utf-8")

    def fetch(self, url: str, body: bytes | None = None) -> Any:
        """Returns the JSON that `url` answers. Raises JudgeError: an error's code, no answer in time, no JSON."""
        # The key goes into the request alone: neither files nor messages have it.
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        try:
            return json.loads(self._read(urllib.request.Request(url, body, headers)))
        except urllib.error.HTTPError as error:
            raise _refusal(url, error, self.key) from error
        except (OSError, http.client.HTTPException) as error:  # refused, broken off, too slow
            reason = getattr(error, "reason", error)
            raise JudgeError(f"the judge {url} gives no answer: {reason or type(error).__name__}", False) from error
        except (ValueError, RecursionError) as error:
            raise JudgeError(f"the judge {url} answers something that is no JSON", False) from error

    def _read(self, request: urllib.request.Request) -> bytes:
        """Returns the body of the answer, all of which must be there in time. Raises OSError."""
        # A socket's timeout is that of one read: who sends a byte a second would never meet it.
        until, data = time.monotonic() + self.timeout, b""
        with _OPENER.open(request, timeout=self.timeout) as response:
            while piece := response.read1(1 << 16):
                data += piece
                if len(data) > REPLY_BYTES:
                    raise OSError(f"more than {REPLY_BYTES >> 20} MiB")
                if time.monotonic() > until:
                    raise TimeoutError(f"not whole after {self.timeout:g} s")
            # What was announced must have come: `read1` ends quietly where a connection breaks.
            if response.length:
                raise http.client.IncompleteRead(data, response.length)
        return data


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: a request would lose its body, and the key go to another host."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _refusal(url: str, error: urllib.error.HTTPError, key: str) -> "JudgeError":
    """What an answer with the code of an error means."""
    headers = error.headers or {}
    if 300 <= error.code < 400:
        there = f"to {headers['Location']}" if headers.get("Location") else "elsewhere"
        return JudgeError(f"the judge {url} redirects {there}: give the address that answers itself", True)
    # Too many requests and errors of the server pass; a wrong key, path or model does not.
    hint = f": is ${key} set?" if error.code in (401, 403) else ""
    passing = error.code in (408, 409, 429) or error.code >= 500
    # Seconds; a date, which it may be too, is not waited for.
    wait = headers.get("Retry-After", "")
    seconds = min(float(wait[:9]), 60.0) if wait.isascii() and wait.isdecimal() else 0.0
    return JudgeError(f"the judge {url} answers {error.code} {error.reason}{hint}", not passing, seconds)


def find_model(server: JudgeServer) -> str:
    """Returns the name of a server's only model. Raises ConfigError where it does not tell, or has several."""
    server.check()
    url = f"{server.url.rstrip('/').removesuffix('/chat/completions')}/models"
    try:
        names = [str(model["id"]) for model in server.fetch(url)["data"]]
    except (JudgeError, KeyError, TypeError) as error:
        reason = error if isinstance(error, JudgeError) else "no list of models"
        raise ConfigError(f"--judge-model must be given: {url} does not tell what there is ({reason})") from error
    if len(names) != 1:
        raise ConfigError(f"--judge-model must be given: {url} has {', '.join(names[:5]) or 'none'}")
    return names[0]


class JudgeError(Exception):
    """A judge gives no verdict. `final`: trying again would not help; `wait`: seconds that the server asks for."""

    def __init__(self, message: str, final: bool, wait: float = 0.0):
        super().__init__(message)
        self.final, self.wait = final, wait
