"""Who may ask for predictions, and how often: API keys from a file, and a rate for each client."""

import hmac
import math
import time
from pathlib import Path
from typing import Any

from flask import Request
from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from gateway.errors import TooManyRequests, Unauthorized


def keys(path: str) -> tuple[bytes, ...]:
    """One API key a line. Raises SystemExit for a file that cannot be read or has none."""
    if not path:
        return ()
    try:
        found = tuple(line.strip() for line in Path(path).read_bytes().splitlines() if line.strip())
    except OSError as exc:
        raise SystemExit(f"API_KEYS_FILE={path!r} cannot be read ({exc.strerror}): mount the Secret there") from exc
    if not found:
        raise SystemExit(f"API_KEYS_FILE={path!r} has no key: write one a line")
    return found


def rate(text: str) -> RateLimitItem | None:
    """A rate like 60/minute or 5/second; none where it is empty. Raises SystemExit."""
    try:
        return parse(text) if text else None
    except ValueError:
        raise SystemExit(f"RATE={text!r} is no rate: write it like 60/minute or 5/second") from None


class Access:
    """Checks a request's key and its client's rate; every process of every gateway counts by itself."""

    def __init__(self, keys: tuple[bytes, ...], rate: RateLimitItem | None) -> None:
        self._keys, self._rate = keys, rate
        self._limiter = MovingWindowRateLimiter(MemoryStorage()) if rate else None

    def check(self, environ: dict[str, Any]) -> str:
        """The client of this WSGI environ: its key's number, or its address. Raises Unauthorized or TooManyRequests."""
        client: str = environ.get("REMOTE_ADDR") or ""
        if self._keys:
            client = self._check_key(Request(environ))
        if self._limiter and self._rate and not self._limiter.hit(self._rate, client):
            reset = self._limiter.get_window_stats(self._rate, client).reset_time
            wait = max(1, math.ceil(reset - time.time()))
            raise TooManyRequests(f"more than {self._rate} from you: wait {wait} s", retry_after=wait)
        return client

    def _check_key(self, request: Request) -> str:
        """The key's number. Given as X-API-Key, or as a password, for which browsers ask by themselves."""
        password = request.authorization.password if request.authorization else None
        given = (request.headers.get("X-API-Key") or password or "").encode()
        # All of them, each in constant time: the time taken tells nothing.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        if not any(matches):
            what = "is not one of this gateway's" if given else "is missing"
            raise Unauthorized(f"the API key {what}: send it as X-API-Key, or as the password (curl -u :KEY)")
        return f"key {matches.index(True)}"
