"""Blobs in a bucket of a real S3 API: acknowledged or not there, whatever happens to the connection or the client."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from broker_config.errors import BlobMissing, BlobStoreUnavailable, ConfigurationError, LatentqError
from broker_config.external_store import StoreUrl
from broker_config.object_store import ObjectStore
from broker_config.settings import Settings, load_settings
from tests.support.external_stores import names_in
from tests.support.processes import ROOT
from tests.support.s3_server import SECRET_KEY, S3Server
from tests.support.tcp_proxy import TcpProxy

NAME: Final = "job-1.in.0123456789abcdef.00112233445566778899aabbccddeeff"
#: The smallest part S3 takes.
PART_BYTES: Final = 5 << 20
#: Three parts.
LARGE: Final = bytes(range(256)) * (11 << 12)
CREDENTIALS: Final = {"s3_access_key_id": "AKIATESTTESTTEST", "s3_secret_access_key": SECRET_KEY}


@pytest.fixture
def settings_of(s3_place: dict[str, Any]) -> Callable[..., Settings]:
    """Settings that lead to the test's bucket, but for what is to differ."""

    def make(**overrides: Any) -> Settings:
        return load_settings(_env_file=None, **(s3_place | overrides))

    return make


def open_store(settings: Settings) -> ObjectStore:
    """The store of these settings, with small parts."""
    assert settings.blob_store is not None
    return ObjectStore(StoreUrl.parse(settings.blob_store), settings, part_bytes=PART_BYTES)


@pytest.fixture
def store(settings_of: Callable[..., Settings]) -> ObjectStore:
    """A store that was just made."""
    made = open_store(settings_of())
    made.create_id(uuid4().hex)
    return made


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[TcpProxy]:
    """What loses connections between a client and the service."""
    port = urlsplit(s3_server.endpoint).port
    assert port is not None
    with TcpProxy(port) as between:
        yield between


# Round trip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", LARGE], ids=["empty", "small", "parts"])
def test_what_was_written_is_read_and_listed_until_deleted(store: ObjectStore, data: bytes) -> None:
    store.write(NAME, data)
    assert store.read(NAME) == data
    (blob,) = store.listing()
    assert blob.name == NAME
    assert -5 < blob.age_s < 60
    store.delete([NAME, "never-was-there"])
    store.delete([NAME])
    assert store.read(NAME) is None
    assert list(store.listing()) == []
    assert store.drop_partial(older_than_s=0) == 0


def test_blobs_and_id_lie_below_the_prefix(store: ObjectStore, s3_server: S3Server, bucket: str) -> None:
    store.write(NAME, b"x")
    assert s3_server.keys(bucket) == {"some/prefix/latentq-store.json", f"some/prefix/blobs/{NAME}"}


def test_a_store_without_prefix_fills_the_bucket(
    settings_of: Callable[..., Settings], s3_server: S3Server, bucket: str
) -> None:
    whole = open_store(settings_of(blob_store=f"s3://{bucket}"))
    whole.create_id(uuid4().hex)
    whole.write(NAME, b"x")
    assert names_in(whole) == {NAME}
    assert s3_server.keys(bucket) == {"latentq-store.json", f"blobs/{NAME}"}


def test_the_first_id_stays(store: ObjectStore) -> None:
    first = store.read_id()
    store.create_id(uuid4().hex)
    assert store.read_id() == first


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "a..b", "x" * 201, "a?b", "a#b", "a%2fb"])
def test_a_name_that_could_leave_the_prefix_is_refused(store: ObjectStore, name: str) -> None:
    acts: list[Callable[[], object]] = [
        lambda: store.write(name, b"x"),
        lambda: store.read(name),
        lambda: store.delete([name]),
    ]
    for act in acts:
        with pytest.raises(BlobMissing):
            act()
    assert list(store.listing()) == []


# Faults ------------------------------------------------------------------------------------------------------

_UPLOADER: Final = """
import json, sys
from broker_config.external_store import StoreUrl
from broker_config.object_store import ObjectStore
from broker_config.settings import load_settings
overrides = json.loads(sys.argv[1])
store = ObjectStore(StoreUrl.parse(overrides["blob_store"]), load_settings(_env_file=None, **overrides),
                    part_bytes=5 << 20)
store.write(sys.argv[2], bytes(range(256)) * (11 << 12))
"""


def test_an_uploader_killed_in_the_middle_leaves_nothing_visible_and_a_retry_succeeds(
    store: ObjectStore, s3_place: dict[str, Any], proxy: TcpProxy
) -> None:
    uploader: list[subprocess.Popen[bytes]] = []

    def kill_halfway(sent: int) -> None:
        if sent > PART_BYTES + PART_BYTES // 2:
            uploader[0].send_signal(signal.SIGKILL)
            raise ConnectionAbortedError  # what it had handed to the kernel does not arrive either

    proxy.on_upload = kill_halfway
    uploader.append(
        subprocess.Popen(
            [sys.executable, "-c", _UPLOADER, json.dumps(s3_place | {"s3_endpoint": proxy.endpoint}), NAME],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    )
    assert uploader[0].wait(timeout=60) == -signal.SIGKILL
    assert store.read(NAME) is None
    assert list(store.listing()) == []
    store.write(NAME, LARGE)
    assert store.read(NAME) == LARGE


def test_connections_that_the_server_drops_are_tried_again(
    settings_of: Callable[..., Settings], store: ObjectStore, proxy: TcpProxy
) -> None:
    through = open_store(settings_of(s3_endpoint=proxy.endpoint))
    proxy.cut_next = 2
    through.write(NAME, b"data")
    proxy.cut()
    proxy.cut_next = 1
    assert through.read(NAME) == b"data"
    assert proxy.connections >= 5


def test_an_upload_whose_connections_are_cut_is_an_error_or_complete(
    settings_of: Callable[..., Settings], store: ObjectStore, proxy: TcpProxy
) -> None:
    through = open_store(settings_of(s3_endpoint=proxy.endpoint))
    cuts = iter([PART_BYTES // 2, PART_BYTES * 2])
    following = [next(cuts)]

    def cut_now_and_then(sent: int) -> None:
        if following and sent > following[0]:
            following[:] = [item for item in [next(cuts, 0)] if item]
            threading.Thread(target=proxy.cut, name="cutter").start()

    proxy.on_upload = cut_now_and_then
    try:
        through.write(NAME, LARGE)
    except BlobStoreUnavailable:
        assert store.read(NAME) in (None, LARGE)
    else:
        assert store.read(NAME) == LARGE


def test_a_service_that_is_away_is_an_error_that_may_pass(settings_of: Callable[..., Settings]) -> None:
    with TcpProxy(9) as nothing:
        away = nothing.endpoint
    store = open_store(settings_of(s3_endpoint=away))
    for act in (lambda: store.write(NAME, b"x"), lambda: store.read(NAME), lambda: store.delete([NAME]),
                lambda: list(store.listing()), store.read_id):  # fmt: skip
        with pytest.raises(BlobStoreUnavailable, match="LATENTQ_S3_ENDPOINT") as caught:
            act()
        assert caught.value.retryable


# Configuration -----------------------------------------------------------------------------------------------


def test_a_bucket_that_does_not_exist_is_an_error_of_configuration(settings_of: Callable[..., Settings]) -> None:
    store = open_store(settings_of(blob_store="s3://no-such-bucket/x"))
    with pytest.raises(ConfigurationError, match="no such bucket"):
        store.read_id()
    with pytest.raises(ConfigurationError, match="no such bucket"):
        store.create_id(uuid4().hex)
    with pytest.raises(BlobStoreUnavailable, match="no such bucket"):  # it was there at the start
        store.write(NAME, b"x")
    with pytest.raises(BlobStoreUnavailable, match="no such bucket"):
        store.read(NAME)


class _Forbidding(http.server.BaseHTTPRequestHandler):
    """A service that does not like the credentials."""

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = _refuse

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def forbidding() -> Iterator[str]:
    """Endpoint of a service that refuses everything."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Forbidding) as server:
        thread = threading.Thread(target=server.serve_forever, name="forbidding", daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_credentials_that_do_not_fit_are_an_error_of_configuration_at_the_start_and_may_pass_later(
    settings_of: Callable[..., Settings], forbidding: str
) -> None:
    store = open_store(settings_of(s3_endpoint=forbidding))
    with pytest.raises(ConfigurationError, match="credentials do not allow"):
        store.read_id()
    with pytest.raises(ConfigurationError, match="credentials do not allow"):
        store.create_id(uuid4().hex)
    with pytest.raises(BlobStoreUnavailable, match="credentials do not allow"):
        store.write(NAME, b"x")


def test_a_secret_is_in_no_message(settings_of: Callable[..., Settings], forbidding: str) -> None:
    settings = settings_of()
    texts = [repr(settings), str(settings), settings.model_dump_json(), repr(open_store(settings))]
    for endpoint in (forbidding, "http://127.0.0.1:9"):
        try:
            open_store(settings_of(s3_endpoint=endpoint)).write(NAME, b"x")
        except LatentqError as error:
            texts += [str(error), repr(error), repr(error.__cause__), str(error.to_wire())]
    assert len(texts) == 12
    assert not [text for text in texts if SECRET_KEY in text]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"s3_allow_http": False}, "LATENTQ_S3_ALLOW_HTTP"),
        ({"s3_secret_access_key": None}, "go together"),
        ({"s3_endpoint": "ftp://host"}, "LATENTQ_S3_ENDPOINT"),
        ({"s3_endpoint": "https://user:password@host"}, "LATENTQ_S3_ENDPOINT"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(
    settings_of: Callable[..., Settings], overrides: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        settings_of(**overrides)
    assert "password" not in str(caught.value)
    assert SECRET_KEY not in str(caught.value)


def test_a_missing_obstore_says_what_to_install(
    settings_of: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'latentq\[s3\]'"):
        open_store(settings_of())


def test_a_producer_without_a_bucket_does_not_load_obstore() -> None:
    code = "import sys, producer; sys.exit('obstore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    "url",
    ["", "folder", "/folder", "file:folder", "file://host/folder", "file:///a/../b", "ftp://x/y", "s3://", "s3://ab",
     "s3://UPPER/x", "s3://key:secret@bucket/x", "s3://bucket/../x", "s3://bucket/a?b", "https://bucket", "s3:/bucket",
     "s3://a..b/x", "file:///a?b"],
)  # fmt: skip
def test_a_url_that_names_no_store_is_refused_with_the_setting(url: str) -> None:
    with pytest.raises(ConfigurationError, match="LATENTQ_BLOB_STORE") as caught:
        load_settings(_env_file=None, blob_store=url)
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match=r".+"):
        StoreUrl.parse(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("file:///srv/blobs/", "file:///srv/blobs"),
        ("file:///srv/my%20blobs", "file:///srv/my%20blobs"),
        ("file://localhost/srv", "file:///srv"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
    ],
)
def test_a_url_is_shown_in_one_form(url: str, shown: str) -> None:
    assert str(StoreUrl.parse(url)) == shown
    assert load_settings(_env_file=None, blob_store=url).blob_store == shown
