"""The rights that docs/operating.md gives a user of the broker are enough for everyone who connects."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import redis
from pydantic import SecretStr

from broker_config.embedded_broker import EmbeddedBroker
from broker_config.settings import Settings
from producer import DecodeClient
from producer.doctor import Level, diagnose
from producer.operations import Operations
from tests.operations.conftest import LATENTS, Made
from tests.operations.test_docs import OPERATING
from worker.rq_adapter import RqPresence


@pytest.fixture
def as_user(broker_server: EmbeddedBroker, settings: Settings, admin: redis.Redis) -> Iterator[Settings]:
    """Settings of someone who connects as that user."""
    (line,) = re.findall(r"^ACL SETUSER latentq (.+)$", OPERATING.read_text(encoding="utf-8"), re.MULTILINE)
    admin.execute_command("ACL", "SETUSER", "latentq", *line.split())
    url = broker_server.url.replace("unix://", "unix://latentq:SECRET@")
    yield settings.model_copy(update={"redis_url": SecretStr(url)})
    admin.acl_deluser("latentq")


def test_a_user_with_the_documented_rights_can_do_everything(as_user: Settings) -> None:
    assert as_user.redis_url is not None
    with DecodeClient.from_url(as_user.redis_url.get_secret_value()) as client:
        presence = RqPresence(
            name="worker-1",
            queues=["latentq.sdxl.normal"],
            connection=client.store.connections.commands,
            ttl_s=60,
            on_stop_job=lambda job_id: None,
            on_shutdown=lambda: None,
        )
        presence.announce()
        presence.beat()
        made = Made(client)
        made.serving("worker-1", "sdxl")
        client.store.lead("janitor-1", ttl_s=60)
        client.store.reap("janitor-1", quiet_s=10)
        made.succeeded("done")
        made.failed("broken")
        client.submit(LATENTS, vae="sdxl", job_id="waits")
        client.store.scan(0, count=100)
        operations = Operations(client)
        assert operations.pause("sd")
        assert operations.resume("sd")
        assert [item.new_id for item in operations.requeue_failed()] == ["broken-r1"]
        assert operations.purge(operations.waiting(operations.queue_names("sdxl"))).canceled == 2
        assert client.job("waits").wait(timeout=10).status == "canceled"
        presence.leave()

    findings = {item.check: item for item in diagnose(as_user).findings}
    assert {name for name, item in findings.items() if item.level is not Level.OK} - {"latency"} == set()
    assert findings["fsync"].finding == "unknown: this broker forbids CONFIG"
    assert "SECRET" not in str(findings)


def test_without_the_right_to_run_scripts_the_doctor_says_so(as_user: Settings, admin: redis.Redis) -> None:
    admin.execute_command("ACL", "SETUSER", "latentq", "-eval", "-evalsha")
    (writes,) = [item for item in diagnose(as_user).findings if item.check == "writes"]
    assert writes.level is Level.PROBLEM
    assert "rights" in (writes.fix or "")
