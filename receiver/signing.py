"""Signatures of requests: canonical bytes, sign, verify. Pure; the clock and the nonce are parameters.

Two forms. `v1` is the specification's: HMAC-SHA256 over "{timestamp}.{raw body}". `v2` covers what a
replay or a redirection could change: timestamp, nonce, method, path with query, and the body's BLAKE3.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from blake3 import blake3

from receiver import contract

MIN_KEY_BYTES = 32
DEFAULT_TOLERANCE_SECONDS = 300


class SignatureRefused(Exception):
    """Authentication failed: invalid signature"""

    problem = "invalid-signature"
    next_step = "Use the same HMAC_SECRET_KEY on both sides (compare its length and its source)."


class ClockRefused(SignatureRefused):
    """Authentication failed: the request's clock is outside the tolerance"""

    problem = "stale-request"
    next_step = "Set both clocks by NTP, then send the request again."

    def __init__(self, skew_seconds: float, tolerance_seconds: int) -> None:
        side = "behind" if skew_seconds > 0 else "ahead of"
        super().__init__(
            f"Authentication failed: the sender's clock is {abs(skew_seconds):.0f} s {side} this host's; "
            f"{tolerance_seconds} s are allowed"
        )
        self.skew_seconds = skew_seconds


@dataclass(frozen=True)
class Envelope:
    """What a v2 signature covers."""

    timestamp: str
    nonce: str
    method: str
    target: str
    body_blake3: str

    def canonical(self) -> bytes:
        """The bytes that are signed: six lines, without a newline at the end."""
        lines = ("v2", self.timestamp, self.nonce, self.method.upper(), self.target, self.body_blake3)
        return "\n".join(lines).encode()


def canonical_v1(timestamp: str, body: bytes) -> bytes:
    """The specification's form: the timestamp, a full stop, and the raw body."""
    return timestamp.encode() + b"." + body


def sign(key: bytes, message: bytes) -> str:
    """HMAC-SHA256 of `message` in 64 lower-case hex digits."""
    return hmac.new(key, message, hashlib.sha256).hexdigest()


def verify(keys: Iterable[bytes], message: bytes, signature: str) -> None:
    """Accept `signature` of any of `keys`, in constant time; raise `SignatureRefused` otherwise."""
    given = signature.encode("utf-8", "replace")
    matches = [hmac.compare_digest(sign(key, message).encode(), given) for key in keys]
    if not any(matches):
        raise SignatureRefused("Authentication failed: Invalid signature")


def check_clock(timestamp: str, now: float, tolerance_seconds: int = DEFAULT_TOLERANCE_SECONDS) -> None:
    """Refuse a timestamp (whole seconds since 1970) that is too old or too far ahead."""
    if not timestamp.isascii() or not timestamp.isdigit() or len(timestamp) > 12:
        raise SignatureRefused("Authentication failed: the timestamp is not whole seconds since 1970")
    skew_seconds = now - int(timestamp)
    if abs(skew_seconds) > tolerance_seconds:
        raise ClockRefused(skew_seconds, tolerance_seconds)


def signed_headers(
    key: bytes,
    method: str,
    target: str,
    body: bytes = b"",
    *,
    now: float | None = None,
    nonce: str | None = None,
) -> Mapping[str, str]:
    """Headers that make a v2 request; `target` is the path with its query."""
    digest = blake3(body).hexdigest()
    timestamp = str(int(time.time() if now is None else now))
    envelope = Envelope(timestamp, nonce or secrets.token_hex(16), method, target, digest)
    return {
        contract.VERSION_HEADER: "v2",
        contract.TIMESTAMP_HEADER: envelope.timestamp,
        contract.NONCE_HEADER: envelope.nonce,
        contract.CONTENT_DIGEST_HEADER: digest,
        contract.SIGNATURE_HEADER: sign(key, envelope.canonical()),
    }
