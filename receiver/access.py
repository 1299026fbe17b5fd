"""Who may call: networks, rate, signature, replay, size. Pure ASGI; nothing parses a byte before it.

Owns the order of the checks. Knows paths and headers of the contract, nothing of deployments.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address

from blake3 import blake3
from pydantic import SecretBytes
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from receiver import contract, signing
from receiver.ledger import Ledger
from receiver.problems import Refusal, respond
from receiver.settings import Network

HOST_TIME_HEADER = "X-Host-Time"
MAX_PEERS = 4096
MAX_SMALL_BODIES = 16
BODY_PATIENCE_SECONDS = 30.0
_NONCE = re.compile(r"[A-Za-z0-9_-]{8,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LENGTH = re.compile(r"[0-9]{1,18}")


class ForeignNetwork(Refusal):
    """The caller's network is not on the allow-list"""

    slug, status = "network-not-allowed", 403
    next_step = "Add the caller's network to IP_WHITELIST on the host and start the receiver again."


class TooManyRequests(Refusal):
    """The caller sends too many requests"""

    slug, status = "too-many-requests", 429
    next_step = "Wait a second; or raise HOOK_RECEIVER_RATE_LIMIT_PER_SECOND on the host."


class Unauthenticated(Refusal):
    """Authentication failed"""

    slug, status = "invalid-signature", 401
    next_step = signing.SignatureRefused.next_step


class SignatureMissing(Unauthenticated):
    """Authentication failed: the request is not signed"""

    slug = "signature-missing"
    next_step = "Sign the request with the key that both sides share."


class StaleRequest(Unauthenticated):
    """Authentication failed: the request's clock is outside the tolerance"""

    slug, next_step = signing.ClockRefused.problem, signing.ClockRefused.next_step


class Replayed(Refusal):
    """The request was received before"""

    slug, status = "replayed-request", 409
    next_step = "Sign each request anew, with a nonce of its own."


class BodyTooLarge(Refusal):
    """The body is too large"""

    slug, status = "body-too-large", 413
    next_step = "Send the package in smaller chunks; a JSON body never needs that much."


class BodyTooSlow(Refusal):
    """The body did not arrive in time"""

    slug, status, error_code = "body-too-slow", 408, contract.ErrorCode.TIMEOUT
    next_step = "See to the network between the hosts, then send the request again."


class DigestMismatch(Refusal):
    """The body is not the one that was signed"""

    slug, status = "content-digest-mismatch", 422
    next_step = "Send the same bytes again; when it happens twice, look for a proxy that changes them."


REASONS = tuple(
    kind.slug
    for kind in (
        *(ForeignNetwork, TooManyRequests, Unauthenticated, SignatureMissing, StaleRequest),
        *(Replayed, BodyTooLarge, BodyTooSlow, DigestMismatch),
    )
)


class ClientGone(Exception):
    """The client closed the connection before its body was whole"""


@dataclass(frozen=True)
class Claim:
    """What a request's head says of its signature; `v2` is None for the specification's form."""

    timestamp: str
    signature: str
    v2: signing.Envelope | None


@dataclass(frozen=True)
class _Room:
    """How large a body may be, how many at a time, and whether its patience is for each piece."""

    max_bytes: int
    slots: asyncio.Semaphore
    patience_per_piece: bool


@dataclass
class RateLimit:
    """A token bucket per peer, of one second's worth; the least recently seen peers are forgotten."""

    per_second: int
    _buckets: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def admits(self, peer: str, now: float) -> bool:
        """Take one token of `peer`; `now` in monotonic seconds."""
        tokens, since = self._buckets.pop(peer, (float(self.per_second), now))
        tokens = min(float(self.per_second), tokens + (now - since) * self.per_second)
        self._buckets[peer] = (tokens - 1 if tokens >= 1 else tokens, now)
        if len(self._buckets) > MAX_PEERS:
            self._buckets.popitem(last=False)
        return tokens >= 1


class Access:
    """ASGI middleware: allow-list, rate limit, signature, size, digest, replay; then the application.

    `/health` is open to every network and `/metrics` needs no signature; both count for the rate limit.
    The application receives the body already read, authenticated and, for v2, compared with its digest.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[SecretBytes],
        ledger: Ledger,
        allowed_networks: Sequence[Network],
        signature_header: str = contract.SIGNATURE_HEADER,
        tolerance_seconds: int = signing.DEFAULT_TOLERANCE_SECONDS,
        rate_limit_per_second: int = 100,
        max_uploads: int = 4,
        body_patience_seconds: float = BODY_PATIENCE_SECONDS,
        clock: Callable[[], float] = time.time,
        on_refusal: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.app = app
        self._keys = tuple(keys)
        self._ledger = ledger
        self._networks = tuple(allowed_networks)
        self._signature_header = signature_header
        self._tolerance_seconds = tolerance_seconds
        self._rate = RateLimit(rate_limit_per_second)
        self._patience_seconds = body_patience_seconds
        self._clock = clock
        self._on_refusal = on_refusal
        self._chunks = _Room(contract.MAX_CHUNK_BYTES, asyncio.Semaphore(max_uploads), True)  # noqa: FBT003
        self._small = _Room(contract.MAX_JSON_BYTES, asyncio.Semaphore(MAX_SMALL_BODIES), False)  # noqa: FBT003
        # Apart: v1 is proven only by its body, and slow callers without a key must hold up nobody else.
        self._unproven = _Room(contract.MAX_JSON_BYTES, asyncio.Semaphore(MAX_SMALL_BODIES), False)  # noqa: FBT003

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            await self._admit(scope, receive, send)
        except Refusal as refusal:
            self._on_refusal(refusal.slug)
            await respond(refusal)(scope, receive, send)
        except ClientGone:
            return

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_peer(scope)
        if scope["path"] in {contract.HEALTH_PATH, contract.METRICS_PATH}:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        claim = self._read_claim(scope, headers)
        room = self._unproven
        if claim.v2 is not None:
            self._verify(claim.v2.canonical(), claim.signature)
            room = self._chunks if scope["method"] == "PATCH" else self._small
        expected_bytes = _check_length(headers, room)
        async with room.slots:
            body = await self._read_body(receive, room, expected_bytes)
            await self._authenticate_body(claim, body)
            await self._spend(claim)
            await self.app(scope, _replay(body, receive), send)

    def _check_peer(self, scope: Scope) -> None:
        peer = _peer(scope)
        if scope["path"] != contract.HEALTH_PATH and not _is_in(self._networks, peer):
            raise ForeignNetwork(
                f"{peer or 'a caller without an address'} is not on this host's allow-list",
                peer=str(peer or ""),
            )
        if not self._rate.admits(peer, time.monotonic()):
            raise TooManyRequests(headers={"Retry-After": "1"})

    def _read_claim(self, scope: Scope, headers: Headers) -> Claim:
        """The signature's parts, complete, well formed and on time."""
        version = headers.get(contract.VERSION_HEADER, "v1")
        if version not in {"v1", "v2"}:
            raise self._unauthenticated(SignatureMissing, f"signature version {version[:20]!r} is unknown")
        if version == "v1" and (scope["method"], scope["path"]) != ("POST", contract.DEPLOY_PATH):
            raise self._unauthenticated(SignatureMissing, f"this call needs {contract.VERSION_HEADER}: v2")
        needed = [contract.TIMESTAMP_HEADER, self._signature_header]
        needed += [contract.NONCE_HEADER, contract.CONTENT_DIGEST_HEADER] if version == "v2" else []
        missing = [name for name in needed if not headers.get(name)]
        if missing:
            raise self._unauthenticated(SignatureMissing, f"missing header {', '.join(missing)}")
        timestamp, signature = headers[contract.TIMESTAMP_HEADER], headers[self._signature_header]
        self._check_clock(timestamp)
        return Claim(timestamp, signature, self._envelope(scope, headers) if version == "v2" else None)

    def _envelope(self, scope: Scope, headers: Headers) -> signing.Envelope:
        nonce, digest = headers[contract.NONCE_HEADER], headers[contract.CONTENT_DIGEST_HEADER]
        if not _NONCE.fullmatch(nonce):
            raise self._unauthenticated(
                SignatureMissing, f"{contract.NONCE_HEADER} is not 8 to 64 letters, digits, '-' or '_'"
            )
        if not _DIGEST.fullmatch(digest):
            raise self._unauthenticated(
                SignatureMissing, f"{contract.CONTENT_DIGEST_HEADER} is not 64 lower-case hex digits"
            )
        timestamp = headers[contract.TIMESTAMP_HEADER]
        return signing.Envelope(timestamp, nonce, scope["method"], _target(scope), digest)

    def _check_clock(self, timestamp: str) -> None:
        try:
            signing.check_clock(timestamp, self._clock(), self._tolerance_seconds)
        except signing.ClockRefused as exc:
            stale = StaleRequest(str(exc), headers=self._challenge(), skew_seconds=round(exc.skew_seconds))
            raise stale from exc
        except signing.SignatureRefused as exc:
            raise Unauthenticated(str(exc), headers=self._challenge()) from exc

    def _verify(self, message: bytes, signature: str) -> None:
        try:
            signing.verify((key.get_secret_value() for key in self._keys), message, signature)
        except signing.SignatureRefused as exc:
            raise Unauthenticated(str(exc), headers=self._challenge()) from exc

    def _unauthenticated(self, kind: type[Unauthenticated], why: str) -> Unauthenticated:
        return kind(f"Authentication failed: {why}", headers=self._challenge())

    def _challenge(self) -> dict[str, str]:
        return {"WWW-Authenticate": "HMAC-SHA256", HOST_TIME_HEADER: str(int(self._clock()))}

    async def _read_body(self, receive: Receive, room: _Room, expected_bytes: int) -> bytearray:
        # Allocated once: a buffer that grows is copied, and for a moment there are two of it.
        body, filled, more = bytearray(expected_bytes), 0, True
        try:
            async with asyncio.timeout(self._patience_seconds) as patience:
                while more:
                    piece, more = _piece(await receive())
                    body[filled : filled + len(piece)] = piece
                    filled += len(piece)
                    if filled > room.max_bytes:
                        raise _too_large(room)
                    if room.patience_per_piece:
                        patience.reschedule(asyncio.get_running_loop().time() + self._patience_seconds)
        except TimeoutError as exc:
            raise BodyTooSlow(headers={"Connection": "close"}) from exc
        del body[filled:]
        return body

    async def _authenticate_body(self, claim: Claim, body: bytearray) -> None:
        if claim.v2 is None:
            self._verify(signing.canonical_v1(claim.timestamp, bytes(body)), claim.signature)
            return
        digest = await asyncio.to_thread(lambda: blake3(body).hexdigest())
        if digest != claim.v2.body_blake3:
            raise DigestMismatch

    async def _spend(self, claim: Claim) -> None:
        """Only a request that proved itself may fill the store; it is kept past the whole window."""
        nonce = f"v2:{claim.v2.nonce}" if claim.v2 else f"v1:{claim.signature}"
        now = self._clock()
        expires_at = now + 2 * self._tolerance_seconds
        if not await asyncio.to_thread(self._ledger.spend_nonce, nonce, now, expires_at):
            raise Replayed


def _peer(scope: Scope) -> str:
    """The caller's address; an IPv4 caller of an IPv6 socket is told as IPv4."""
    client = scope.get("client")
    try:
        address = ip_address(client[0]) if client else None
    except ValueError:
        return ""
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return str(address) if address else ""


def _is_in(networks: Iterable[Network], peer: str) -> bool:
    return bool(peer) and any(ip_address(peer) in network for network in networks)


def _target(scope: Scope) -> str:
    """Path and query as they stood in the request line."""
    path, query = scope["raw_path"], scope["query_string"]
    return str((path + b"?" + query if query else path).decode("latin-1"))


def _piece(message: Message) -> tuple[bytes, bool]:
    """The bytes of one message, and whether more are to come."""
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)


def _check_length(headers: Headers, room: _Room) -> int:
    """The length that the head announces; 0 where it announces none."""
    length = headers.get("content-length", "0")
    if not _LENGTH.fullmatch(length) or int(length) > room.max_bytes:
        raise _too_large(room)
    return int(length)


def _too_large(room: _Room) -> BodyTooLarge:
    # What follows is not read, so the connection cannot be used again.
    return BodyTooLarge(f"this call takes at most {room.max_bytes} bytes", headers={"Connection": "close"})


def _replay(body: bytearray, receive: Receive) -> Receive:
    """`receive` for the application: the whole body at once, then what the server says."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again
