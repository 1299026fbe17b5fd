"""The gateway that an engine pushes into, without an engine: what it takes, and what it refuses."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path

import pytest

from tasks.push_gateway import Gateway
from tasks.push_protocol import MAX_MANIFEST_BYTES

LAYER = b"a layer's files " * 10_000
SENT = gzip.compress(LAYER, mtime=0)
KNOWN = f"sha256:{'0' * 64}"
FOREIGN = f"/v2/{'f' * 32}/image"


def digest_of(content: bytes) -> str:
    """As registries write it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the gateway keeps blobs."""
    made = tmp_path / "blobs"
    made.mkdir()
    return made


@pytest.fixture
def gateway(folder: Path) -> Iterator[Gateway]:
    """A gateway that has one blob already, and takes a megabyte."""
    with Gateway(lambda digest: digest == KNOWN, folder=folder, limit_bytes=1_000_000) as gateway:
        yield gateway


def connect(gateway: Gateway) -> http.client.HTTPConnection:
    """A new connection."""
    return http.client.HTTPConnection(gateway.name.partition("/")[0], timeout=10)


def ask(gateway: Gateway, method: str, path: str, body: bytes | Iterator[bytes] = b"") -> HTTPResponse:
    """Ask for a path below the push's name, or for an absolute one; an iterator is sent in chunks."""
    connection = connect(gateway)
    connection.request(method, path if path.startswith("/") else f"/v2/{gateway.repository}/{path}", body)
    answer = connection.getresponse()
    answer.read()
    return answer


def begin(gateway: Gateway) -> str:
    """The address of a new upload."""
    answer = ask(gateway, "POST", "blobs/uploads/")
    assert answer.status == 202
    return str(answer.getheader("Location"))


def send(gateway: Gateway, content: bytes) -> str:
    """Send a blob as an engine does, and return its upload's address."""
    upload = begin(gateway)
    chunks = (content[start : start + 1000] for start in range(0, len(content), 1000))
    answer = ask(gateway, "PATCH", upload, chunks)
    assert (answer.status, answer.getheader("Range")) == (202, f"0-{len(content) - 1}")
    return upload


def test_a_layer_is_taken_decompressed_and_named_by_its_diff_id(gateway: Gateway) -> None:
    """Sent in chunks, closed by its digest; from then on it need not be sent again."""
    upload = send(gateway, SENT)
    assert ask(gateway, "PUT", f"{upload}?digest={digest_of(SENT)}").status == 201
    blob = gateway.blobs[digest_of(SENT)]
    assert (blob.diff_id, blob.size_bytes) == (digest_of(LAYER), len(LAYER))
    assert blob.path.read_bytes() == LAYER
    assert ask(gateway, "HEAD", f"blobs/{digest_of(SENT)}").status == 200


@pytest.mark.parametrize(
    "content",
    [b'{"rootfs": {}}', b"{}", b"", gzip.compress(b"a", mtime=0) + gzip.compress(b"b", mtime=0)],
    ids=["configuration", "document", "nothing", "two members"],
)
def test_a_blob_in_one_request_is_taken(gateway: Gateway, content: bytes) -> None:
    """By POST alone, or as the body of PUT; plain, tiny, empty, or gzip in several members."""
    whole = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    for address in ("blobs/uploads/", begin(gateway)):
        method = "PUT" if address.startswith("/") else "POST"
        assert ask(gateway, method, f"{address}?digest={digest_of(content)}", content).status == 201
        assert gateway.blobs.pop(digest_of(content)).path.read_bytes() == whole


def test_what_the_host_has_is_not_asked_for(gateway: Gateway) -> None:
    """Neither by HEAD nor by a mount; anything else is to be sent."""
    assert ask(gateway, "HEAD", f"blobs/{KNOWN}").status == 200
    assert ask(gateway, "POST", f"blobs/uploads/?mount={KNOWN}&from=other").status == 201
    other = digest_of(b"other")
    assert ask(gateway, "HEAD", f"blobs/{other}").status == 404
    assert ask(gateway, "POST", f"blobs/uploads/?mount={other}&from=other").status == 202


def test_nothing_is_given_back(gateway: Gateway) -> None:
    """No blob, no manifest: a gateway is for one sender."""
    ask(gateway, "PUT", f"{send(gateway, SENT)}?digest={digest_of(SENT)}")
    ask(gateway, "PUT", "manifests/push", b"{}")
    for path in (f"blobs/{digest_of(SENT)}", "manifests/push", "tags/list", "/v2/_catalog"):
        assert ask(gateway, "GET", path).status == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("HEAD", f"{FOREIGN}/blobs/{KNOWN}"),
        ("POST", f"{FOREIGN}/blobs/uploads/"),
        ("PUT", f"{FOREIGN}/manifests/push"),
        ("GET", "/"),
    ],
)
def test_a_foreign_client_finds_nothing(gateway: Gateway, folder: Path, method: str, path: str) -> None:
    """Who does not know the push's name gets 404, and leaves no trace."""
    assert ask(gateway, method, path, b"x" * 100).status == 404
    assert not gateway.was_reached
    assert not gateway.manifests
    assert not [*folder.iterdir()]


def test_a_foreign_client_cannot_write_to_an_upload(gateway: Gateway) -> None:
    """An upload's id alone is not enough: it belongs below the push's name."""
    upload = send(gateway, SENT)
    stolen = upload.replace(gateway.repository, FOREIGN.removeprefix("/v2/"))
    assert ask(gateway, "PATCH", stolen, b"more").status == 404
    assert ask(gateway, "PUT", f"{upload}?digest={digest_of(SENT)}").status == 201


def test_a_blob_with_a_wrong_digest_is_refused(gateway: Gateway, folder: Path) -> None:
    """Nothing of it is kept, and its upload is over."""
    upload = send(gateway, SENT)
    assert ask(gateway, "PUT", f"{upload}?digest={digest_of(LAYER)}").status == 400
    assert ask(gateway, "PUT", f"{upload}?digest={digest_of(SENT)}").status == 404
    assert not gateway.blobs
    assert not [*folder.iterdir()]


def test_a_layer_whose_compression_breaks_off_is_refused(gateway: Gateway, folder: Path) -> None:
    """Also when its digest is right."""
    torn = SENT[:-9]
    assert ask(gateway, "PUT", f"{send(gateway, torn)}?digest={digest_of(torn)}").status == 400
    assert not [*folder.iterdir()]


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 1000\r\n\r\nshort",
        b"Transfer-Encoding: chunked\r\n\r\n64\r\nshort",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nshort",
        b"Transfer-Encoding: chunked\r\n\r\nmany\r\nshort",
        b"Content-Length: -5\r\n\r\nshort",
    ],
)
def test_a_blob_that_is_cut_leaves_nothing(gateway: Gateway, folder: Path, body: bytes) -> None:
    """The connection ends in the middle: the upload is dropped, and the next one is not disturbed."""
    upload = begin(gateway)
    with socket.create_connection(("127.0.0.1", connect(gateway).port), timeout=10) as raw:
        raw.sendall(f"PATCH {upload} HTTP/1.1\r\nHost: x\r\n".encode() + body)
        raw.shutdown(socket.SHUT_WR)
        assert raw.recv(1000) == b""
    assert not [*folder.iterdir()]
    assert ask(gateway, "PUT", f"{upload}?digest={digest_of(b'short')}").status == 404
    assert ask(gateway, "PUT", f"{send(gateway, SENT)}?digest={digest_of(SENT)}").status == 201


def test_a_replayed_upload_is_unknown(gateway: Gateway) -> None:
    """Once closed, an upload takes no byte more."""
    closing = f"{send(gateway, SENT)}?digest={digest_of(SENT)}"
    assert ask(gateway, "PUT", closing).status == 201
    for method, path in (("PUT", closing), ("PATCH", closing), ("DELETE", closing)):
        assert ask(gateway, method, path, b"again").status == 404
    assert gateway.blobs[digest_of(SENT)].path.read_bytes() == LAYER


def test_a_cancelled_upload_is_gone(gateway: Gateway, folder: Path) -> None:
    """With its file."""
    upload = send(gateway, SENT)
    assert ask(gateway, "DELETE", upload).status == 204
    assert not [*folder.iterdir()]


def test_two_writers_of_one_upload_are_not_mixed(gateway: Gateway) -> None:
    """The second one is told that the upload is not there, while the first writes."""
    upload, go_on, began = begin(gateway), threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        yield SENT[:100]
        began.set()
        go_on.wait(10)
        yield SENT[100:]

    writer = threading.Thread(target=ask, args=(gateway, "PATCH", upload, slowly()))
    writer.start()
    began.wait(10)
    while ask(gateway, "PATCH", upload, b"").status != 404:
        continue
    go_on.set()
    writer.join(10)
    assert ask(gateway, "PUT", f"{upload}?digest={digest_of(SENT)}").status == 201


def test_more_than_was_expected_ends_the_push(gateway: Gateway, folder: Path) -> None:
    """Counted decompressed, so that little can become much; nothing is taken from then on."""
    bomb = gzip.compress(bytes(50_000_000))
    answer = ask(gateway, "PATCH", begin(gateway), bomb)
    assert answer.status == 403
    assert gateway.is_overspent
    assert gateway.refusal
    assert ask(gateway, "POST", "blobs/uploads/").status == 403
    assert ask(gateway, "PUT", "manifests/push", b"{}").status == 403
    assert not [*folder.iterdir()]


def test_a_disk_that_takes_nothing_ends_the_push(gateway: Gateway, folder: Path) -> None:
    """The reason is kept for whoever asked for the push."""
    shutil.rmtree(folder)
    assert ask(gateway, "POST", "blobs/uploads/").status == 403
    assert "cannot be written" in str(gateway.refusal)


def test_a_layer_in_zstd_ends_the_push(gateway: Gateway) -> None:
    """It is not taken for an uncompressed one."""
    assert ask(gateway, "PATCH", begin(gateway), b"\x28\xb5\x2f\xfd" + bytes(100)).status == 403
    assert "zstd" in str(gateway.refusal)


def test_a_manifest_is_kept_under_its_digest(gateway: Gateway) -> None:
    """One that is longer than any manifest is not."""
    manifest = json.dumps({"layers": []}).encode()
    answer = ask(gateway, "PUT", "manifests/push", manifest)
    assert (answer.status, answer.getheader("Docker-Content-Digest")) == (201, digest_of(manifest))
    assert gateway.manifests == {digest_of(manifest): manifest}
    endless = (b" " * 65536 for _ in range(MAX_MANIFEST_BYTES // 65536 + 1))
    assert ask(gateway, "PUT", "manifests/push", endless).status == 413


def test_an_engine_that_tries_tls_first_goes_on_in_plain(gateway: Gateway) -> None:
    """As engines do with registries on loopback."""
    with socket.create_connection(("127.0.0.1", connect(gateway).port), timeout=10) as raw:
        raw.sendall(bytes.fromhex("16030100f8010000f40303") + bytes(200))
        assert raw.recv(1000).startswith(b"HTTP/")  # by which they know that they may
    assert ask(gateway, "GET", "/v2/").status == 200


def test_the_end_leaves_neither_port_nor_file_nor_thread(folder: Path) -> None:
    """Also in the middle of a blob, with a client that keeps silent."""
    before = threading.active_count()
    with Gateway(lambda _: False, folder=folder, limit_bytes=1_000_000) as gateway:
        upload = begin(gateway)
        raw = socket.create_connection(("127.0.0.1", connect(gateway).port), timeout=10)
        raw.sendall(f"PATCH {upload} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nshort".encode())
        while ask(gateway, "PATCH", upload, b"").status != 404:
            continue
        begin(gateway)
    with raw:
        assert raw.recv(1000) == b""
    with pytest.raises(ConnectionRefusedError):
        ask(gateway, "GET", "/v2/")
    assert threading.active_count() == before
    assert not [*folder.iterdir()]


def test_one_layer_comes_after_the_other_where_that_is_asked_for() -> None:
    """Without a folder nothing is kept, and the second upload is read when the first is done."""
    with Gateway(lambda _: False, folder=None, limit_bytes=0, one_at_a_time=True) as gateway:
        first, second = begin(gateway), begin(gateway)
        go_on, done = threading.Event(), list[str]()

        def waiting() -> Iterator[bytes]:
            yield SENT[:10]
            go_on.wait(10)
            yield SENT[10:]

        def run(name: str, body: Callable[[], bytes | Iterator[bytes]], upload: str) -> None:
            ask(gateway, "PATCH", upload, body())
            done.append(name)

        slow = threading.Thread(target=run, args=("first", waiting, first))
        slow.start()
        while ask(gateway, "PATCH", first, b"").status != 404:
            continue
        quick = threading.Thread(target=run, args=("second", lambda: SENT, second))
        quick.start()
        quick.join(0.2)
        assert quick.is_alive()
        go_on.set()
        slow.join(10)
        quick.join(10)
        assert sorted(done) == ["first", "second"]
        assert ask(gateway, "PUT", f"{second}?digest={digest_of(SENT)}").status == 201
        assert gateway.blobs == {}
