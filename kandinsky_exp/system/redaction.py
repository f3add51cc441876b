"""Remove passwords, tokens and signed addresses from texts that are shown or recorded.

Everything that leaves the process goes through here: parameters, `config.yaml`, `train.log`, messages, tracebacks.
"""

import base64
import binascii
import functools
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
SHORTEST = 6  # characters of an environment variable's value that is taken for a secret

# A name, or a part of one, behind which a secret stands: `sslpassword`, `X-Amz-Signature`, `ssl_key`; no `keyword`.
SAYS_SECRET = (
    r"(?:password|passwd|passphrase|token|secret|signature|credential|api_?key|access_?key"  # nosec B105 # a pattern
    r"|(?<![a-z])(?:pwd|key|sig|sas|auth)(?![a-z]))"
)
ENVIRONMENT = re.compile(
    r"(?:^|_)(?:TOKENS?|PASS|PASSWORD|PASSWD|PASSPHRASE|SECRETS?|CREDENTIALS?|PAT|API_?KEYS?|(?:ACCESS|SECRET|PRIVATE|AUTH)"
    r"_KEY)(?:$|_)|(?:^|_)\w*(?:PASSWORD|TOKEN|SECRET|APIKEY)$",
    re.IGNORECASE,
)
NO_SECRET = re.compile(r"_(?:PATH|FILE|DIR|NAME|URL|TYPE|SOCK|TTL|EXPIRES|HELPER)$", re.IGNORECASE)
SETTING = re.compile(rf"(?:.*_)?{SAYS_SECRET}", re.IGNORECASE)

USER = re.compile(r"(?P<scheme>\w://)[^/?#\s\"'<>]*@")
# A database's password may hold a slash, where that of a web address ends.
DATABASE_USER = re.compile(r"(?i)\b(?P<scheme>(?!https?:)[a-z][\w+.-]*://)[^:/?#\s@\"']+:[^@\s\"']*@")
QUERY = re.compile(r"(?i)(?P<address>\bhttps?://[^?#\s\"'<>]*)\?(?P<query>[^\s\"'<>]+)")
PARAMETER = re.compile(rf"(?i)(?P<name>[?&;#][\w.%-]*{SAYS_SECRET}[\w.%-]*=)[^&\s\"'<>]+")
RANDOM = re.compile(r"(?=[^&]*\d)(?=[^&]*[A-Za-z])[\w%+/.~=-]{20,}")  # no word is like that
HUB_TOKEN = re.compile(r"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}")
HEADER = re.compile(
    r"(?i)(?P<name>\b(?:proxy-)?authorization\b[\"']?\s*[:=]\s*[\"']?)(?:(?:bearer|basic|token)\s+)?[^\s\"',}]+"
)
BEARER = re.compile(r"(?i)\b(?P<name>bearer\s+)(?=\S*\d)[\w.~+/=-]{12,}")
BASIC = re.compile(r"(?i)\b(?P<name>basic\s+)(?P<token>[A-Za-z0-9+/]{4,}={0,2})(?![\w+/])")


def masked(text: str) -> str:
    """`text` with `***` in place of every password, token and signed query in it; ordinary words stay."""
    text = _without_values(text)
    text = DATABASE_USER.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = USER.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = QUERY.sub(_query, text)
    text = PARAMETER.sub(rf"\g<name>{HIDDEN}", text)
    text = HUB_TOKEN.sub(HIDDEN, text)
    text = HEADER.sub(rf"\g<name>{HIDDEN}", text)
    text = BEARER.sub(rf"\g<name>{HIDDEN}", text)
    return BASIC.sub(_basic, text)


def redacted(values: Any) -> Any:
    """Nested settings with their texts masked. Of a web address no query stays, and nothing of `password: ...`."""
    if isinstance(values, dict):
        return {
            name: HIDDEN if isinstance(value, str) and SETTING.fullmatch(str(name)) else redacted(value)
            for name, value in values.items()
        }
    if isinstance(values, list):
        return [redacted(value) for value in values]
    if isinstance(values, str):
        return re.sub(r"(?i)^(https?://[^?#\s]*)\?\S+$", rf"\1?{HIDDEN}", masked(values))
    return values


class Formatter(logging.Formatter):
    """Formats records as its base does, tracebacks too, and masks the whole."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def _query(match: re.Match[str]) -> str:
    query = match["query"]
    holds_secret = PARAMETER.search(f"?{query}") or any(
        RANDOM.fullmatch(part.partition("=")[2]) for part in re.split("[&;]", query)
    )
    return f"{match['address']}?{HIDDEN}" if holds_secret else match[0]


def _basic(match: re.Match[str]) -> str:
    """`Basic` is a word as well: what follows it has to be a user and a password."""
    try:
        pair = base64.b64decode(match["token"], validate=True)
    except (binascii.Error, ValueError):
        return match[0]
    return f"{match['name']}{HIDDEN}" if b":" in pair else match[0]


def _without_values(text: str) -> str:
    """Without what environment variables hold whose names speak of secrets: also where a library's error quotes it."""
    for value in sorted(set(_secret_values()), key=len, reverse=True):
        if value.isalpha() and value.islower():  # a word: only where it stands alone
            text = re.sub(rf"(?<![A-Za-z0-9]){value}(?![A-Za-z0-9])", HIDDEN, text)
        else:
            text = text.replace(value, HIDDEN)
    return text


def _secret_values() -> Iterator[str]:
    for name in list(os.environ):  # a library's thread may set and remove some meanwhile: `items` would raise
        value = os.environ.get(name, "")
        if _says_secret(name):
            yield from _forms(value)
        elif "://" in value and "@" in value:  # drivers quote the password alone
            for password in re.findall(r"://[^:/?#\s@]*:([^@\s]*)@", value):
                yield from _forms(password)


@functools.cache
def _says_secret(name: str) -> bool:
    return bool(ENVIRONMENT.search(name)) and not NO_SECRET.search(name)


def _forms(secret: str) -> Iterator[str]:
    """A secret as it is written in texts, in addresses and in JSON; one of several lines line by line."""
    for line in secret.splitlines():
        plain = line.strip()
        if len(plain) >= SHORTEST and not (plain.startswith("/") and os.path.exists(plain)):  # noqa: PTH110 - NUL
            yield from (plain, quote(plain, safe=""), json.dumps(plain)[1:-1])
