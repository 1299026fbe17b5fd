"""Bearer tokens of the HTTP API: made, listed, revoked, and recognised.

Owns the file that holds them, `$GANTRY_HOME/api_tokens.json`. A token is 32 random bytes, so it cannot be
guessed from its SHA-256 and needs neither salt nor a slow hash: those are for words that people choose.
Imports no Prefect, no SQL and no HTTP.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from tasks import store
from tasks.errors import GantryError

PREFIX = "gantry_"
"""Tells scanners for leaked secrets what they found."""
RANDOM_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_WRITABLE_BY_OTHERS = 0o022


class TokenNameRefused(GantryError):
    """The token's name cannot be used"""

    next_step = "Give 1 to 64 letters, digits, '_', '.' or '-', and a name that no other token has."


class TokenUnknown(GantryError):
    """There is no token of that name"""

    next_step = "List the names: python -m deployments.api token list."


class TokensUnreadable(GantryError):
    """The file of the API's tokens cannot be used"""

    next_step = "Make the file readable to the API's user and writable to nobody else, or make tokens anew."


class ApiToken(BaseModel):
    """A token at rest: its name, and the SHA-256 of its text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created_at: AwareDatetime


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    tokens: tuple[ApiToken, ...] = ()


class TokenStore:
    """The tokens of one file; each question reads it, so that a revoked token ends at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def from_environment(cls) -> TokenStore:
        """GANTRY_API_TOKENS_FILE, else `api_tokens.json` in GANTRY_HOME."""
        given = os.environ.get("GANTRY_API_TOKENS_FILE", "").strip()
        return cls(Path(given).expanduser() if given else store.home() / "api_tokens.json")

    def create(self, name: str, at: datetime) -> str:
        """A new token, told this once; raises `TokenNameRefused` or `TokensUnreadable`."""
        if not _NAME.fullmatch(name):
            raise TokenNameRefused(f"A token cannot be named {name!r}")
        token = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
        with self._alone():
            held = self.list()
            if any(other.name == name for other in held):
                raise TokenNameRefused(f"A token is named {name!r} already")
            self._write((*held, ApiToken(name=name, sha256=_hash(token), created_at=at)))
        return token

    def revoke(self, name: str) -> None:
        """End a token; raises `TokenUnknown` or `TokensUnreadable`."""
        with self._alone():
            held = self.list()
            kept = tuple(token for token in held if token.name != name)
            if len(kept) == len(held):
                raise TokenUnknown(f"No token is named {name!r}")
            self._write(kept)

    def list(self) -> tuple[ApiToken, ...]:
        """The tokens in the order of their making; none without a file. Raises `TokensUnreadable`."""
        try:
            with self.path.open("rb") as stream:
                _check_mode(self.path, os.fstat(stream.fileno()))
                return _File.model_validate_json(stream.read()).tokens
        except FileNotFoundError:
            return ()
        except OSError as exc:
            raise TokensUnreadable(f"{self.path} cannot be read: {exc.strerror}") from exc
        except ValidationError as exc:
            raise TokensUnreadable(f"{self.path} is not a file of tokens") from exc

    def identify(self, token: str) -> str | None:
        """The name of a token, or None; every stored hash is compared, each in constant time."""
        offered, found = _hash(token), None
        for held in self.list():
            if hmac.compare_digest(held.sha256, offered):
                found = held.name
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One writer at a time; the lock is a file of its own, since the tokens' file is replaced."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write(self, tokens: tuple[ApiToken, ...]) -> None:
        """Whole or not at all, mode 600 from its first byte."""
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        part = Path(name)
        try:
            with os.fdopen(descriptor, "w") as stream:
                stream.write(_File(tokens=tokens).model_dump_json(indent=2) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(self.path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _check_mode(path: Path, status: os.stat_result) -> None:
    """Whoever can write the file can let himself in."""
    if status.st_mode & _WRITABLE_BY_OTHERS or status.st_uid not in {os.geteuid(), 0}:
        raise TokensUnreadable(f"{path} belongs to another user, or can be written by one (chmod 600)")


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
