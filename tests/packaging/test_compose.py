"""compose.yaml and the Dockerfile: valid, safe, and what they start is what works here, as local processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import redis
import requests
import yaml
from jsonschema import Draft202012Validator

from broker_config import keys
from broker_config.settings import Settings
from broker_config.supported_servers import find_server_binary, verify_server
from producer import DecodeClient, JobStatus
from producer.gateway.settings import GatewaySettings
from tests.conftest import need_tool
from tests.support.keys_left import assert_no_stray_keys
from tests.support.wait import wait_until
from worker.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}
_INTERPOLATION = re.compile(r"\$\{(\w+):-([^}]*)\}")
#: A cold start imports torch, which takes half a minute on a slow disk.
_READY_S = 120.0


def interpolated(node: Any, environment: Mapping[str, str]) -> Any:
    """`node` with each `${NAME:-default}` filled in, as compose does it."""
    if isinstance(node, dict):
        return {key: interpolated(value, environment) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolated(value, environment) for value in node]
    if not isinstance(node, str):
        return node
    filled = _INTERPOLATION.sub(lambda match: environment.get(match[1]) or match[2], node)
    assert "$" not in filled, f"only ${{NAME:-default}} is used in compose.yaml, not {node!r}"
    return filled


def seconds(duration: str) -> float:
    """A duration of the form that compose.yaml uses: `120s`, `15m`."""
    return float(duration[:-1]) * _UNITS_S[duration[-1]]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """compose.yaml as it is with an empty environment."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    filled: dict[str, Any] = interpolated(document, {})
    return filled


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text(encoding="utf-8")


def stages(dockerfile: str) -> dict[str, str]:
    """Build stages by name, each with its lines."""
    parts = re.split(r"^FROM +\S+ +AS +(\S+)$", dockerfile, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_compose_yaml_is_what_the_compose_specification_allows(compose: dict[str, Any]) -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    errors = sorted(Draft202012Validator(schema).iter_errors(compose), key=str)
    assert [f"{error.json_path}: {error.message}" for error in errors] == []


def test_the_schema_refuses_a_misspelt_key(compose: dict[str, Any]) -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text(encoding="utf-8"))
    wrong = compose | {"services": {"worker": compose["services"]["worker"] | {"stop_grace": "1s"}}}
    assert not Draft202012Validator(schema).is_valid(wrong)


def test_each_variable_of_a_service_is_a_setting(compose: dict[str, Any]) -> None:
    known = {f"LATENTQ_{name.upper()}" for name in Settings.model_fields}
    known |= {f"LATENTQ_WORKER_{name.upper()}" for name in WorkerSettings.model_fields}
    known |= {f"LATENTQ_GATEWAY_{name.upper()}" for name in GatewaySettings.model_fields}
    used = {name for service in compose["services"].values() for name in service.get("environment", {})}
    assert {name for name in used if name.startswith("LATENTQ_")} <= known


#: Settings that compose.yaml decides itself.
_FIXED = {"LATENTQ_REDIS_URL", "LATENTQ_LOG_FORMAT", "LATENTQ_WORKER_DEVICE", "LATENTQ_GATEWAY_HOST"}


def test_each_variable_of_the_example_reaches_a_service() -> None:
    """docker compose reads .env to fill in compose.yaml: what is not named there is dropped without a word."""
    named = set(re.findall(r"^# (\w+)=", (ROOT / ".env.example").read_text(encoding="utf-8"), re.MULTILINE))
    assert "LATENTQ_RETENTION_S" in named
    document = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    filled = set(_INTERPOLATION.findall(yaml.safe_dump(document["services"])))
    assert named - _FIXED == {name for name, _ in filled} & named


def test_images_have_what_the_stores_that_compose_offers_need(compose: dict[str, Any], dockerfile: str) -> None:
    assert all("LATENTQ_BLOB_STORE" in each["environment"] for each in compose["services"].values() if "build" in each)
    there = stages(dockerfile)
    assert "pip install -c constraints.txt '.[s3]'" in there["build"]
    assert "pip install -c constraints.txt '.[worker,s3]'" in there["build-worker"]


def test_the_worker_gets_longer_to_stop_than_it_takes(compose: dict[str, Any]) -> None:
    grace_s = WorkerSettings.model_fields["grace_s"].default
    workers = [service for service in compose["services"].values() if service.get("image") == "latentq-worker"]
    assert len(workers) == 2
    assert all(seconds(service["stop_grace_period"]) > grace_s for service in workers)


def test_no_log_grows_without_bound(compose: dict[str, Any]) -> None:
    """Docker's json-file rotates nothing unless it is told to."""
    for name, service in compose["services"].items():
        assert service["logging"] == {"driver": "json-file", "options": {"max-size": "50m", "max-file": "5"}}, name


def test_everything_waits_for_a_healthy_broker_and_runs_under_an_init(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if name != "broker":
            assert service["depends_on"] == {"broker": {"condition": "service_healthy"}}
            assert service["init"] is True
    assert "healthcheck" in compose["services"]["broker"]


def test_only_the_gateway_is_published_on_loopback_and_nobody_gets_privileges(compose: dict[str, Any]) -> None:
    assert compose["services"]["gateway"].pop("ports") == ["127.0.0.1:8765:8765"]
    for name, service in compose["services"].items():
        assert not {"ports", "privileged", "network_mode", "pid", "user"} & set(service), name
        if name != "broker":
            assert service["cap_drop"] == ["ALL"]


def test_each_gpu_service_names_its_own_device(compose: dict[str, Any]) -> None:
    # With `count: 1` every replica and every service gets the same, first GPU.
    taken: list[str] = []
    for service in compose["services"].values():
        reserved = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        for device in reserved:
            assert "count" not in device
            taken += device["device_ids"]
            assert service["profiles"] == ["gpu"]
            assert "replicas" not in service["deploy"]
    assert taken == ["0"]


def test_each_build_target_is_a_stage_that_ends_as_an_unprivileged_user(
    compose: dict[str, Any], dockerfile: str
) -> None:
    there = stages(dockerfile)
    targets = {service["build"]["target"] for service in compose["services"].values() if "build" in service}
    assert targets == {"base", "worker"}
    for target in targets:
        assert re.findall(r"^USER (\S+)$", there[target], flags=re.MULTILINE) == ["latentq"], target


def test_the_weights_volume_is_where_the_image_looks_for_weights(compose: dict[str, Any], dockerfile: str) -> None:
    name, path = compose["services"]["worker"]["volumes"][0].split(":")
    assert name in compose["volumes"]
    assert f"HF_HOME={path} " in stages(dockerfile)["worker"]
    assert f"--owner=latentq --group=latentq {path}\n" in stages(dockerfile)["worker"]


def test_what_the_dockerfile_copies_is_there_and_not_ignored(dockerfile: str) -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    assert lines.index("*") < lines.index("!pyproject.toml")
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for arguments in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, flags=re.MULTILINE):
        copied.update(arguments.split()[:-1])
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


@dataclass
class Running:
    """A service of compose.yaml as a process of this machine."""

    process: subprocess.Popen[bytes]
    log: Path
    environment: dict[str, str]

    def check(self) -> None:
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-4000:]


class Stack:
    """The services of the default profile, as local processes on loopback."""

    def __init__(self, compose: Mapping[str, Any], folder: Path) -> None:
        self._services = compose["services"]
        self._folder = folder
        self.running: dict[str, Running] = {}
        self.port = 0

    @property
    def url(self) -> str:
        """Where compose.yaml has its broker, but for host and port."""
        written: str = self._services["worker"]["environment"]["LATENTQ_REDIS_URL"]
        return written.replace("//broker:6379/", f"//127.0.0.1:{self.port}/")

    def start_broker(self) -> None:
        """The broker's own command, with another program, folder and port."""
        program, *arguments = self._services["broker"]["command"]
        assert program == "valkey-server"
        for _ in range(5):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
            here = ["--dir", str(self._folder), "--bind", "127.0.0.1", "--port", str(self.port)]
            broker = self._spawn("broker", [str(find_server_binary()), *arguments, *here], {})
            if wait_until(partial(self._answers, broker), timeout_s=30, what="the broker") == "yes":
                return
        raise AssertionError(broker.log.read_text())

    def start(self, name: str, *command: str, **changed: str) -> Running:
        """A service that runs latentq, with its own command (or another) and environment (but for what is changed)."""
        service = self._services[name]
        program, *arguments = command or service["command"]
        installed = Path(sys.executable).with_name(program)
        assert installed.is_file(), f"{installed} is missing: pip install -e ."
        mounted = {each.split(":")[1]: each.split(":")[0] for each in service.get("volumes", [])}
        environment = {key: mounted.get(str(value), str(value)) for key, value in service["environment"].items()}
        environment |= changed | {"LATENTQ_REDIS_URL": self.url}
        return self._spawn(name, [sys.executable, str(installed), *arguments], environment)

    def stop(self) -> dict[str, int]:
        """Ends what runs, the broker last, each within its stop_grace_period. Returns exit statuses."""
        statuses = {}
        for name, running in reversed(self.running.items()):
            running.process.terminate()
            try:
                statuses[name] = running.process.wait(seconds(self._services[name].get("stop_grace_period", "10s")))
            except subprocess.TimeoutExpired:
                running.process.kill()
                statuses[name] = running.process.wait()
        self.running.clear()
        return statuses

    def _answers(self, broker: Running) -> str:
        if broker.process.poll() is not None:
            return "ended"  # the port was taken in between
        with redis.Redis(port=self.port, socket_connect_timeout=1) as client:
            try:
                return "yes" if client.ping() and client.info("server")["process_id"] == broker.process.pid else ""
            except redis.RedisError:
                return ""

    def _spawn(self, name: str, command: list[str], environment: dict[str, str]) -> Running:
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TMPDIR") if key in os.environ}
        environment = kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
        log = self._folder / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, env=environment, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        self.running[name] = Running(process, log, environment)
        return self.running[name]


@pytest.fixture
def stack(compose: dict[str, Any], tmp_path: Path) -> Iterator[Stack]:
    """The broker, ready; more services on request."""
    started = Stack(compose, tmp_path)
    try:
        started.start_broker()
        yield started
    finally:
        started.stop()


@pytest.mark.slow
def test_the_services_decode_a_demo_job_and_stop_in_good_order(stack: Stack, compose: dict[str, Any]) -> None:
    default = [name for name, service in compose["services"].items() if "profiles" not in service]
    assert default == ["broker", "worker", "janitor"]
    others = [stack.start(name) for name in default if name != "broker"]
    latents = resources.files("worker") / "demo_vae" / "latents" / "astronaut.safetensors"

    with DecodeClient.from_url(stack.url, _env_file=None) as client, redis.Redis.from_url(stack.url) as admin:
        verify_server(admin)

        def served() -> bool:
            for running in others:
                running.check()
            return client.store.served({"demo"}) == {"demo"}

        wait_until(served, timeout_s=_READY_S, what="a worker that serves the demo VAE")
        assert healthy(stack) == (0, "")
        with resources.as_file(latents) as path:
            job = client.submit_file(path, vae="demo")
        snapshot = job.wait(timeout=60)
        assert snapshot.status is JobStatus.SUCCEEDED, snapshot.errors
        assert snapshot.request is not None
        assert job.image().size == (snapshot.request.width, snapshot.request.height)
        for running in others:
            running.check()
        wait_until(lambda: admin.hget(keys.REAPER, "janitor"), what="the janitor to look after leases")

        broker = stack.running.pop("broker")
        try:
            assert stack.stop() == {"worker": 0, "janitor": 0}
            assert healthy(stack)[0] == 1
            assert_no_stray_keys(admin)
        finally:
            stack.running["broker"] = broker
    assert stack.stop() == {"broker": 0}


def test_the_gateway_starts_once_there_is_a_key_and_lets_nobody_in_without(stack: Stack) -> None:
    refused = stack.start("gateway")
    assert refused.process.wait(60) == 2
    assert "latentq keys add NAME" in refused.log.read_text()
    added = stack.start("gateway", "latentq", "keys", "add", "somebody")
    assert added.process.wait(60) == 0
    token = added.log.read_text().split()[-1]

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gateway = stack.start("gateway", LATENTQ_GATEWAY_PORT=str(port))

    def status(**headers: str) -> int:
        gateway.check()
        try:
            return requests.get(f"http://127.0.0.1:{port}/v1/vaes", headers=headers, timeout=10).status_code
        except requests.ConnectionError:
            return 0

    assert wait_until(status, timeout_s=60, what="the gateway") == 401
    assert status(Authorization=f"Bearer {token}") == 200
    assert stack.stop()["gateway"] == 0


def healthy(stack: Stack) -> tuple[int, str]:
    """Exit status and words of the worker image's health check."""
    (command,) = re.findall(r"^HEALTHCHECK .*\\\n +CMD (\[.+\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    program, script = json.loads(command)
    assert program == "python"
    done = subprocess.run(
        [sys.executable, ROOT / "deploy" / Path(script).name],
        env={"PATH": os.environ["PATH"], "LATENTQ_REDIS_URL": stack.url},
        cwd=stack.running["broker"].log.parent if "broker" in stack.running else None,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stderr


def test_the_brokers_health_check_passes_while_it_runs_and_fails_when_it_does_not(
    stack: Stack, compose: dict[str, Any]
) -> None:
    kind, program, *arguments = compose["services"]["broker"]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "valkey-cli")
    cli = shutil.which("valkey-cli") or need_tool("redis-cli")
    command = [cli, "-p", str(stack.port), *arguments]
    assert subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
    stack.stop()
    assert subprocess.run(command, capture_output=True, timeout=10, check=False).returncode != 0
