"""Signatures: fixed vectors of both forms, and what is refused."""

from __future__ import annotations

import hashlib
import hmac
import json

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from receiver import contract, signing
from receiver.signing import ClockRefused, Envelope, SignatureRefused

KEY = b"0123456789abcdef0123456789abcdef"
BODY = b'{"container_name":"my-service","image_tag":"v1.2.0"}'
NOW = 1_761_350_400
# Also made by: printf '1761350400.<body>' | openssl dgst -sha256 -hmac <key>
V1 = "318a49b7b515699f3320223ebffd06d6ead9f54436ead6a10fa21ab6fd803d3b"
V2 = "9b5d4bfdd9a6adbe0acfb7e1b7ad84f7f717769c09ad3d166ce3b867edb81c03"


def specification_signature(payload: object, timestamp: str, secret: str) -> str:
    """The specification's own recipe, word for word."""
    message = f"{timestamp}.{json.dumps(payload)}"
    return hmac.new(secret.encode(), message.encode(), hashlib.sha256).hexdigest()


def test_the_v1_vector_holds() -> None:
    """Bytes on the wire cannot change unnoticed."""
    assert signing.sign(KEY, signing.canonical_v1(str(NOW), BODY)) == V1


def test_the_v2_vector_holds() -> None:
    """All six lines, in their order, with the BLAKE3 of the body."""
    headers = signing.signed_headers(
        KEY, "post", "/api/deploy?dry=1", BODY, now=NOW + 0.9, nonce="n0nce-0001"
    )
    assert headers == {
        "X-Deployment-Signature-Version": "v2",
        "X-Deployment-Timestamp": str(NOW),
        "X-Deployment-Nonce": "n0nce-0001",
        "X-Content-BLAKE3": "147a1d5178ac7bc8ccfb487e9a1cb7fd91b0b810aafdd5e68996e6a5999464cb",
        "X-Deployment-Signature": V2,
    }


def test_the_specifications_client_signs_what_we_verify() -> None:
    """Its `json.dumps` with spaces is the raw body, so its signature is accepted."""
    payload = {"container_name": "omninode-orchestrator", "image_tag": "latest"}
    signature = specification_signature(payload, str(NOW), KEY.decode())
    message = signing.canonical_v1(str(NOW), json.dumps(payload).encode())
    signing.verify([KEY], message, signature)


@pytest.mark.parametrize("keys", [[KEY, b"x" * 32], [b"x" * 32, KEY]])
def test_any_of_several_keys_verifies(keys: list[bytes]) -> None:
    """Current and previous key hold together while a key is rotated."""
    signing.verify(keys, signing.canonical_v1(str(NOW), BODY), V1)


@pytest.mark.parametrize("signature", ["", V1[:-1], V1.upper(), V2, "é" * 64, V1 + " "])
def test_every_other_signature_is_refused(signature: str) -> None:
    """In the words that the specification's tests look for."""
    with pytest.raises(SignatureRefused, match="Authentication failed: Invalid signature"):
        signing.verify([KEY], signing.canonical_v1(str(NOW), BODY), signature)


def test_no_key_verifies_nothing() -> None:
    """An empty list of keys is not an open door."""
    with pytest.raises(SignatureRefused):
        signing.verify([], signing.canonical_v1(str(NOW), BODY), V1)


@pytest.mark.parametrize("field", ["timestamp", "nonce", "method", "target", "body_blake3"])
def test_each_part_of_the_envelope_counts(field: str) -> None:
    """Nothing that is covered can be exchanged."""
    parts = {
        "timestamp": str(NOW),
        "nonce": "n0nce-0001",
        "method": "POST",
        "target": "/api/deploy?dry=1",
        "body_blake3": blake3(BODY).hexdigest(),
    }
    signing.verify([KEY], Envelope(**parts).canonical(), V2)
    with pytest.raises(SignatureRefused):
        signing.verify([KEY], Envelope(**{**parts, field: "other"}).canonical(), V2)


@given(body=st.binary(max_size=200), timestamp=st.integers(0, 10**12 - 1))
def test_the_two_forms_never_say_the_same(body: bytes, timestamp: int) -> None:
    """No v1 message can be read as a v2 message: a signature of one is worth nothing in the other."""
    assert not signing.canonical_v1(str(timestamp), body).startswith(b"v2\n")
    assert Envelope(str(timestamp), "n" * 8, "GET", "/", "0").canonical().startswith(b"v2\n")


def test_each_request_has_a_nonce_of_its_own() -> None:
    """Without one given, two equal requests differ."""
    first, second = (signing.signed_headers(KEY, "GET", "/", now=NOW) for _ in range(2))
    assert first[contract.NONCE_HEADER] != second[contract.NONCE_HEADER]


@pytest.mark.parametrize("skew_seconds", [-300, -1, 0, 1, 300])
def test_the_whole_tolerance_is_granted(skew_seconds: int) -> None:
    """Both ends of the window are inside."""
    signing.check_clock(str(NOW), NOW + skew_seconds)


@pytest.mark.parametrize(("skew_seconds", "words"), [(301, "301 s behind"), (-301, "301 s ahead of")])
def test_a_clock_outside_is_refused_with_its_difference(skew_seconds: int, words: str) -> None:
    """The message says which clock, and how far."""
    with pytest.raises(ClockRefused, match=words) as refused:
        signing.check_clock(str(NOW), NOW + skew_seconds)
    assert refused.value.skew_seconds == skew_seconds


@pytest.mark.parametrize("timestamp", ["", "now", "1.5", "-1", "1e9", "\u0661\u0662", "9" * 13, " 1", "1\n"])
def test_a_timestamp_is_whole_seconds(timestamp: str) -> None:
    """Anything else is a refused signature, never a crash."""
    with pytest.raises(SignatureRefused):
        signing.check_clock(timestamp, NOW)
