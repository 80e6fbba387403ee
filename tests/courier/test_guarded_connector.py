"""The connector against real servers on loopback: what may not be called gets no connection, whatever leads there."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from broker_config.errors import WebhookAddressRefused, WebhookUrlRefused
from broker_config.receiver_url import ReceiverUrl
from broker_config.url_guard import UrlGuard
from tests.support.fake_resolver import FakeResolver
from worker.courier.guarded_connector import GuardedConnector, guarded_post, guarded_session

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Receiver:
    """A server on loopback that counts its connections."""

    def __init__(self, handler: Handler | None = None) -> None:
        self._handler = handler
        self.requests: list[web.BaseRequest] = []
        self.connections = 0
        self.port = 0

    @contextlib.asynccontextmanager
    async def running(self, host: str = "127.0.0.1", *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
        server = web.Server(self._answer)
        serves = server.__call__

        def connected() -> asyncio.Protocol:
            self.connections += 1
            return serves()

        listening = await asyncio.get_running_loop().create_server(connected, host, self.port, ssl=tls)
        self.port = listening.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listening.close()
            await server.shutdown(1.0)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append(request)
        return web.Response(text="thanks") if self._handler is None else await self._handler(request)  # type: ignore[arg-type]


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 60))


async def post(session: aiohttp.ClientSession, url: str) -> tuple[int, bytes]:
    async with guarded_post(session, ReceiverUrl.parse(url), body=b"{}", headers={}) as answer:
        return answer.status, await answer.content.read(100)


def guard_of(receiver: Receiver, *allow: str) -> UrlGuard:
    """A guard under which https to the receiver's port is a matter of its address alone."""
    return UrlGuard.allowing(allow, ports=(443, receiver.port))


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["::1"], ["0.0.0.0"], ["::ffff:127.0.0.1"], ["10.0.0.1", "127.0.0.1", "::1"]]
)
def test_a_name_that_lies_gets_no_connection(addresses: list[str]) -> None:
    async def story() -> None:
        async with Receiver().running() as receiver:
            resolver = FakeResolver({"hook.example": [addresses]})
            async with guarded_session(guard_of(receiver), resolver=resolver) as session:
                with pytest.raises(WebhookAddressRefused) as refusal:
                    await post(session, f"https://hook.example:{receiver.port}/")
            assert resolver.asked["hook.example"] == 1
            assert all(address not in refusal.value.message for address in addresses)
        assert receiver.connections == 0

    run(story())


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "localhost"])
def test_a_host_that_is_here_gets_no_connection_also_when_nobody_checked_the_url(host: str) -> None:
    async def story() -> None:
        async with Receiver().running() as receiver, guarded_session(guard_of(receiver)) as session:
            with pytest.raises(WebhookUrlRefused):
                await session.post(f"https://{host}:{receiver.port}/", allow_redirects=False)
        assert receiver.connections == 0

    run(story())


def test_a_name_that_resolves_to_something_else_the_next_time_gets_no_connection_then() -> None:
    async def story() -> None:
        async with Receiver().running("127.0.0.2") as good:
            secret = Receiver()
            secret.port = good.port  # so that only the address tells the two apart
            async with secret.running("127.0.0.1"):
                resolver = FakeResolver({"hook.example": [["127.0.0.2"], ["127.0.0.1"]]})
                guard = UrlGuard.allowing([f"http://127.0.0.2:{good.port}"])
                url = f"http://hook.example:{good.port}/"
                async with guarded_session(guard, resolver=resolver) as session:
                    assert await post(session, url) == (200, b"thanks")
                async with guarded_session(guard, resolver=resolver) as session:
                    with pytest.raises(WebhookAddressRefused):
                        await post(session, url)
            assert resolver.asked["hook.example"] == 2
        assert (good.connections, secret.connections) == (1, 0)

    run(story())


def test_of_several_addresses_the_one_that_is_allowed_is_called() -> None:
    async def story() -> None:
        async with Receiver().running("127.0.0.2") as receiver:
            resolver = FakeResolver({"hook.example": [["::1", "10.0.0.1", "127.0.0.1", "127.0.0.2"]]})
            guard = UrlGuard.allowing([f"http://127.0.0.2:{receiver.port}"])
            async with guarded_session(guard, resolver=resolver) as session:
                assert await post(session, f"http://hook.example:{receiver.port}/") == (200, b"thanks")
        assert receiver.requests[0].host == f"hook.example:{receiver.port}"

    run(story())


def test_that_one_name_is_allowed_opens_its_address_for_no_other_name_also_at_the_same_time() -> None:
    async def story() -> None:
        async with Receiver().running() as receiver:
            names = {"good.example": [["127.0.0.1"]], "evil.example": [["127.0.0.1"]]}
            guard = guard_of(receiver, f"http://good.example:{receiver.port}", "http://10.0.0.0/8:*")
            async with guarded_session(guard, resolver=FakeResolver(names)) as session:
                urls = [f"http://{name}.example:{receiver.port}/{n}" for n in range(20) for name in ("good", "evil")]
                answers = await asyncio.gather(*(post(session, url) for url in urls), return_exceptions=True)
        assert answers[0::2] == [(200, b"thanks")] * 20
        assert {type(answer) for answer in answers[1::2]} == {WebhookAddressRefused}
        assert {request.host for request in receiver.requests} == {f"good.example:{receiver.port}"}

    run(story())


def test_a_failure_to_connect_is_told_from_a_refusal() -> None:
    async def story() -> None:
        async with Receiver().running() as receiver:
            port = receiver.port
        resolver = FakeResolver({"hook.example": [["127.0.0.1"]]})
        guard = UrlGuard.allowing([f"http://*.example:{port}"])
        async with guarded_session(guard, resolver=resolver) as session:
            with pytest.raises(aiohttp.ClientConnectorError):
                await post(session, f"http://hook.example:{port}/")
            with pytest.raises(aiohttp.ClientConnectorDNSError):
                await post(session, f"http://nobody.example:{port}/")

    run(story())


def test_a_connection_is_kept_and_judged_again_for_each_request() -> None:
    async def story() -> None:
        async with Receiver().running() as receiver:
            resolver = FakeResolver({"hook.example": [["127.0.0.1"]]})
            guard = UrlGuard.allowing([f"http://hook.example:{receiver.port}"])
            async with guarded_session(guard, resolver=resolver) as session:
                for _ in range(3):
                    assert await post(session, f"http://hook.example:{receiver.port}/") == (200, b"thanks")
        assert (receiver.connections, len(receiver.requests)) == (1, 3)

    run(story())


# What would lead around the check --------------------------------------------------------------------------------


def test_a_redirect_is_an_answer_and_leads_nowhere() -> None:
    async def story() -> None:
        async with Receiver().running() as secret:

            async def away(request: web.Request) -> web.StreamResponse:
                return web.Response(status=307, headers={"Location": f"http://127.0.0.1:{secret.port}/"})

            async with Receiver(away).running() as receiver:
                resolver = FakeResolver({"hook.example": [["127.0.0.1"]]})
                url = f"http://hook.example:{receiver.port}/"
                guard = UrlGuard.allowing([f"http://hook.example:{receiver.port}"])
                async with guarded_session(guard, resolver=resolver) as session:
                    assert (await post(session, url))[0] == 307
                    with pytest.raises(WebhookUrlRefused):  # also if someone forgets to turn redirects off
                        await session.post(url, data=b"{}")
        assert secret.connections == 0

    run(story())


def test_proxies_of_the_environment_and_of_a_request_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with Receiver().running() as proxy, Receiver().running() as receiver:
            for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            monkeypatch.setenv("no_proxy", "")
            resolver = FakeResolver({"hook.example": [["127.0.0.1"]]})
            url = f"http://hook.example:{receiver.port}/"
            async with guarded_session(
                UrlGuard.allowing([f"http://hook.example:{receiver.port}"]), resolver=resolver
            ) as session:
                assert (await post(session, url))[0] == 200
                with pytest.raises(WebhookUrlRefused, match="proxy"):
                    await session.post(url, proxy=f"http://127.0.0.1:{proxy.port}")
        assert (proxy.connections, receiver.connections) == (0, 1)

    run(story())


def test_cookies_are_not_kept_and_nothing_is_unpacked() -> None:
    packed = gzip.compress(b"0" * 1_000_000)

    async def bomb(request: web.Request) -> web.StreamResponse:
        answer = web.Response(body=packed, headers={"Content-Encoding": "gzip"})
        answer.set_cookie("who", "you")
        return answer

    async def story() -> None:
        async with Receiver(bomb).running() as receiver:
            resolver = FakeResolver({"hook.example": [["127.0.0.1"]]})
            url = f"http://hook.example:{receiver.port}/"
            async with guarded_session(
                UrlGuard.allowing([f"http://hook.example:{receiver.port}"]), resolver=resolver
            ) as session:
                assert await post(session, url) == (200, packed[:100])
                await post(session, url)
        assert [dict(request.cookies) for request in receiver.requests] == [{}, {}]

    run(story())


def test_a_connection_that_nobody_asked_the_guard_for_is_refused() -> None:
    async def story() -> None:
        connector = GuardedConnector(UrlGuard.allowing(["http://127.0.0.1:*"]))
        with pytest.raises(PermissionError):
            connector._open_socket((2, 1, 6, "", ("127.0.0.1", 80)))
        await connector.close()

    run(story())


# TLS -------------------------------------------------------------------------------------------------------------


def own_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for `name` that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(who, who, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(certificate.public_bytes(form))
    (folder / "key.pem").write_bytes(
        key.private_bytes(form, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


def test_the_receiver_must_have_a_certificate_for_its_name(tmp_path: Path) -> None:
    certificate, key = own_certificate(tmp_path, "hook.example")
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate, key)
    trusting = ssl.create_default_context(cafile=str(certificate))

    async def story() -> None:
        async with Receiver().running(tls=serving) as receiver:
            names = ("hook.example", "other.example")
            resolver = FakeResolver({name: [["127.0.0.1"]] for name in names})
            guard = UrlGuard.allowing([f"{name}:{receiver.port}" for name in names])
            async with guarded_session(guard, resolver=resolver, ssl_context=trusting) as session:
                assert await post(session, f"https://hook.example:{receiver.port}/") == (200, b"thanks")
                with pytest.raises(aiohttp.ClientConnectorCertificateError):
                    await post(session, f"https://other.example:{receiver.port}/")
            async with guarded_session(guard, resolver=resolver) as session:
                with pytest.raises(aiohttp.ClientConnectorCertificateError):
                    await post(session, f"https://hook.example:{receiver.port}/")
        assert len(receiver.requests) == 1

    run(story())
