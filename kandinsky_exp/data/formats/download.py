"""Files by http(s): streams that continue where the connection broke, and what tells versions of a file apart."""

import base64
import hashlib
import http.client
import io
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from kandinsky_exp.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

TIMEOUT = 30.0  # seconds without a byte
TRIES = 4
PAUSE = 0.25  # seconds before the second try; twice as long before each further one
FOR_GOOD = {*range(400, 500)} - {408, 429}  # HTTP codes that another try does not change
BLOCK = 1 << 20

Result = TypeVar("Result")


def is_url(path: str) -> bool:
    return path.lower().startswith(("http://", "https://"))


def shown(url: str) -> str:
    """A URL fit for messages: no user, no password, no query, which may hold a token. A path stays."""
    if not is_url(url):
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def identity(url: str) -> str:
    """64 hex digits that change when the file does: by ETag or Last-Modified, else by content.

    Raises:
        DataError: if the server does not give the file.
    """
    headers = _retried(url, lambda: _headers(url))
    tag = headers.get("ETag") or headers.get("Last-Modified")
    if tag:
        parts = [shown(url), tag, headers.get("Content-Length", "")]
        return hashlib.sha256(repr(parts).encode()).hexdigest()
    with open_url(url) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_url(url: str) -> io.BufferedReader:
    """A stream of the file's bytes; where the connection breaks it is taken up again at the same byte.

    Raises:
        DataError: here or while reading, if the server does not give the file.
    """
    return io.BufferedReader(_Stream(url), BLOCK)


class _Stream(io.RawIOBase):
    def __init__(self, url: str) -> None:
        self.url, self.offset = url, 0
        self.response = _retried(url, lambda: _open(url, "GET"))
        length = self.response.headers.get("Content-Length")
        self.tag = self.response.headers.get("ETag") or self.response.headers.get("Last-Modified")
        self.end = int(length) if length else None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer)
        block: bytes = _retried(self.url, lambda: self._read(len(view)), self._go_on)
        view[: len(block)] = block
        self.offset += len(block)
        return len(block)

    def _read(self, size: int) -> bytes:
        block: bytes = self.response.read(size)
        if not block and self.end is not None and self.offset < self.end:
            raise ConnectionResetError(0, f"the connection broke after {self.offset:,} of {self.end:,} bytes")
        return block

    def _go_on(self) -> None:
        self.response.close()
        if self.tag or not self.offset:
            wanted = {"Range": f"bytes={self.offset}-", "If-Range": self.tag} if self.offset else {}
            self.response = _open(self.url, "GET", wanted)
            if not self.offset or self.response.status == http.client.PARTIAL_CONTENT:
                return
        raise DataError(f"{shown(self.url)}: the connection broke and the server cannot go on; start again")

    def close(self) -> None:
        if not self.closed and hasattr(self, "response"):
            self.response.close()
        super().close()


def _headers(url: str) -> Any:
    try:
        with _open(url, "HEAD") as response:
            return response.headers
    except urllib.error.HTTPError as error:
        if error.code not in (403, 405, 501):  # signed addresses are often good for GET alone
            raise
    with _open(url, "GET") as response:
        return response.headers


def _open(url: str, method: str, headers: dict[str, str] | None = None) -> Any:
    parts = urlsplit(url)
    secret, _, host = parts.netloc.rpartition("@")
    path, query = (quote(text, safe="/%:@!$&'()*+,;=~?") for text in (parts.path, parts.query))
    plain = urlunsplit((parts.scheme, host, path, query, ""))
    request = urllib.request.Request(plain, headers=headers or {}, method=method)
    if secret:
        token = base64.b64encode(unquote(secret).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")  # not for whom we are sent on to
    return urllib.request.urlopen(request, timeout=TIMEOUT)  # nosec B310 # http(s): is_url was asked before


def _retried(url: str, action: Callable[[], Result], mend: Callable[[], None] = lambda: None) -> Result:
    """The result of `action`, tried a few times with `mend` in between."""
    reason = ""
    for attempt in range(TRIES):
        try:
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
                mend()
            return action()
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code in FOR_GOOD:
                break
        except (ValueError, http.client.InvalidURL):  # their text may hold the query
            reason = "not a valid address"
            break
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            reason = str(cause) or type(error).__name__
    raise DataError(f"{shown(url)} cannot be read: {reason}; check data.path and the connection")
