"""The status page in a real browser: what it shows, what it does, with a keyboard, in the dark, on a phone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from broker_config.settings import Settings
from tests.conftest import need_tool
from tests.gateway.conftest import SECRET, WEBHOOKS, safetensors
from tests.gateway.test_job_api import submit
from tests.support.browser import Browser
from tests.support.gateways import RunningGateway
from tests.support.store_worker import StoreWorker
from tests.support.told_courier import ToldCourier
from tests.support.wait import wait_until

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser for all."""
    with Browser(need_tool("chromium")) as opened:
        yield opened


@pytest.fixture
def browser(chromium: Browser, gateways: Callable[..., RunningGateway]) -> Iterator[Browser]:
    """A fresh page, which must not have complained when the test ends. Left before the gateways stop."""
    chromium.forget()
    chromium.look()
    yield chromium
    chromium.call("Network.clearBrowserCookies")
    chromium.open("about:blank")
    assert chromium.surprises() == []


def png(colour: str = "teal") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


def finish(worker: StoreWorker, data: bytes | None = None) -> None:
    claim = worker.claim_one()
    worker.store.complete(claim, worker.result(claim, data=data or png()))


def test_queues_workers_results_and_failures_are_shown_and_stay_live(
    browser: Browser, gateway: RunningGateway, worker: StoreWorker
) -> None:
    worker.store.serve(
        "gpu-box-1", ["sd"], ttl_s=60, report={"vaes": ["sd"], "device": "cuda:0", "busy_s": 9, "idle_s": 1, "jobs": 12}
    )
    submit(gateway, name="fox", metadata=json.dumps({"prompt": "a fox in the snow"}))
    finish(worker)
    submit(gateway, name="broken")
    worker.fail(worker.claim_one())
    browser.open(gateway.url)
    browser.until("document.querySelector('#live').className === 'on'")
    text = browser.text()
    for words in (
        "gpu-box-1",
        "cuda:0",
        "90 %",
        "a fox in the snow",
        "decode_failed",
        "the VAE raised",
        "0 queued, 0 running",
    ):
        assert words in text
    browser.until("document.querySelector('#gallery img').naturalWidth === 16")
    submit(gateway, name="later")
    browser.until("document.querySelector('#live').textContent.includes('1 queued')")
    finish(worker)
    browser.until("document.querySelectorAll('#gallery img').length === 2")
    assert browser.js("document.querySelector('#rate').textContent") is not None


def test_a_failed_job_is_decoded_again_with_the_keyboard(
    browser: Browser, gateway: RunningGateway, worker: StoreWorker
) -> None:
    submit(gateway, name="broken")
    worker.fail(worker.claim_one())
    browser.open(gateway.url)
    browser.until("document.querySelector('#failed button') !== null")
    browser.focus("#failed button")
    assert (
        browser.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    )  # where the focus is can be seen
    browser.press("Enter")
    browser.until("document.querySelector('#failed button').textContent === 'Submitted again'")
    (again,) = gateway.get("/v1/decodes?status=queued").json()["jobs"]
    assert again["source_job_id"] == "broken"


def test_a_webhook_that_was_given_up_is_sent_again_with_the_keyboard(
    browser: Browser,
    gateways: Callable[..., RunningGateway],
    settings: Settings,
    worker: StoreWorker,
    courier: ToldCourier,
) -> None:
    gateway = gateways(settings.model_copy(update=WEBHOOKS))
    gateway.post("/v1/webhook-secrets", json={"secret": SECRET})
    submit(gateway, name="fox", webhook="https://hooks.example/secret-path")
    finish(worker)
    browser.open(gateway.url)
    browser.until("document.querySelector('#webhooks-now').textContent.includes('1 on their way')")
    courier.work("stopped", status=410)
    browser.until("document.querySelector('#webhooks button') !== null")
    shown = browser.js("document.querySelector('#webhooks-section').innerText")
    for words in ("0 on their way · 1 given up", "succeeded · https://hooks.example", "fox · 1 attempt", "status 410"):
        assert words in shown
    assert "secret-path" not in shown
    browser.focus("#webhooks button")
    browser.press("Enter")
    browser.until("document.querySelector('#webhooks-now').textContent.includes('1 on their way')")
    assert courier.work() == ["msg_fox_succeeded"]
    browser.until("document.querySelector('#webhooks li button:not(:disabled)')?.textContent === 'Send again'")
    browser.focus("#webhooks button")
    browser.press("Enter")
    wait_until(lambda: courier.work("delivered", status=200) == ["msg_fox_succeeded"])
    browser.until("document.querySelector('#webhooks-section').innerText.includes('None was given up.')")


def test_a_file_is_submitted_and_its_picture_shown(
    browser: Browser, gateway: RunningGateway, worker: StoreWorker, tmp_path: Path
) -> None:
    worker.store.serve("box", ["sd"], ttl_s=60, report={"vaes": ["sd"]})
    path = tmp_path / "latents.safetensors"
    path.write_bytes(safetensors())
    browser.open(gateway.url)
    browser.until("document.querySelector('#vae').options.length > 1")
    assert browser.js("document.querySelector('#vae').value") == "sd"  # what a worker serves comes first
    browser.choose_file("#file", path)
    browser.until("document.querySelector('#zone-text').textContent.includes('latents.safetensors')")
    browser.focus("#drop button")
    browser.press("Enter")
    wait_until(lambda: gateway.get("/v1/decodes?status=queued").json()["jobs"], what="the job")
    finish(worker, png("crimson"))
    browser.until("document.querySelector('#drop-result img')?.naturalWidth === 16")
    browser.expected.append("415")
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"not a tensor file, no")
    browser.choose_file("#file", other)
    browser.js("document.querySelector('#drop button').click()")
    browser.until("document.querySelector('#drop-status').textContent.includes('safetensors')")


def test_a_result_opens_with_its_facts_and_closes_with_escape(
    browser: Browser, gateway: RunningGateway, worker: StoreWorker
) -> None:
    submit(gateway, name="fox", metadata=json.dumps({"prompt": "a fox", "seed": "7"}))
    finish(worker)
    browser.open(gateway.url)
    browser.until("document.querySelector('#gallery button') !== null")
    browser.focus("#gallery button")
    browser.press("Enter")
    browser.until("document.querySelector('#viewer').open")
    facts = browser.js("document.querySelector('#viewer').innerText")
    for words in ("fox", "seed", "7", "16×16", "sd, unpacked"):
        assert words in facts
    browser.press("Escape")
    browser.until("!document.querySelector('#viewer').open")


def test_what_a_stranger_wrote_is_text(browser: Browser, gateway: RunningGateway, worker: StoreWorker) -> None:
    hostile = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'
    submit(gateway, name="hostile", metadata=json.dumps({"prompt": hostile, "<b>key</b>": hostile}))
    finish(worker)
    submit(gateway, name="broken")
    claim = worker.claim_one()
    worker.store.fail(claim, {"code": hostile, "message": hostile, "attempt": 1}, retryable=False, traceback="")
    browser.open(gateway.url)
    browser.until(
        "document.querySelector('#gallery button') !== null && document.querySelector('#failed button') !== null"
    )
    browser.js("document.querySelector('#gallery button').click()")
    assert browser.text().count("onerror") >= 3
    assert browser.js("window.hit") is None


def test_with_keys_it_asks_for_one_and_shows_what_that_one_may_see(
    browser: Browser, guarded: RunningGateway, new_key: Callable[..., str], worker: StoreWorker
) -> None:
    token, other = new_key("submit", "read", name="web"), new_key("submit", "read")
    submit(guarded, key=token, name="mine")
    finish(worker)
    submit(guarded, key=other, name="theirs")
    finish(worker)
    browser.expected.append("401")
    browser.open(guarded.url)
    browser.until("document.querySelector('#login')?.hidden === false")
    assert browser.js("document.activeElement.id") == "token"
    browser.type("lq_wrong")
    browser.press("Enter")
    browser.until("document.querySelector('#login-error').textContent.includes('unknown')")
    browser.js("document.querySelector('#token').value = ''")
    browser.js("document.querySelector('#token').focus()")
    browser.type(token)
    browser.press("Enter")
    browser.until("document.querySelectorAll('#gallery img').length === 1")
    assert browser.js("document.querySelector('#gallery img').alt") == "Result of mine"
    assert browser.js("document.querySelector('#workers-section').hidden")
    assert browser.js("document.cookie") == ""  # scripts cannot read it
    browser.focus("#logout")
    browser.press("Enter")
    browser.until("document.querySelector('#login')?.hidden === false && document.querySelector('#main').hidden")


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_every_width_and_can_be_read(
    browser: Browser,
    gateways: Callable[..., RunningGateway],
    settings: Settings,
    worker: StoreWorker,
    courier: ToldCourier,
    width: int,
    dark: bool,
) -> None:
    gateway = gateways(settings.model_copy(update=WEBHOOKS))
    gateway.post("/v1/webhook-secrets", json={"secret": SECRET})
    worker.store.serve(
        "a-worker-with-a-rather-long-name-31415-a1b2c3",
        ["sd", "sdxl", "flux"],
        ttl_s=60,
        report={"vaes": ["sd", "sdxl", "flux"]},
    )
    submit(gateway, name="x" * 64, metadata=json.dumps({"prompt": "word" * 60}))
    finish(worker)
    submit(gateway, name="y" * 64, webhook=f"https://{'hooks.' * 30}example/")
    worker.fail(worker.claim_one())
    courier.work()
    browser.look(width=width, dark=dark)
    for path in ("/", "/docs"):
        browser.open(gateway.url + path)
        browser.until("document.querySelectorAll('#gallery img, #paths details').length > 0")
        assert browser.js("document.documentElement.scrollWidth") <= width
        browser.until("document.querySelector('#webhooks button, #paths') !== null")
        if path == "/":
            assert browser.js(
                "(({scrollWidth, clientWidth}) => scrollWidth <= clientWidth)(document.querySelector('.scroll'))"
            )
        for selector in ("body", "h2", "th", "a"):
            assert contrast(browser, selector) >= 4.5, (path, selector)  # WCAG 2.2, 1.4.3


def test_a_page_that_came_up_during_an_outage_goes_on_after_it(browser: Browser, gateway: RunningGateway) -> None:
    browser.expected.append("net::ERR_BLOCKED_BY_CLIENT")
    browser.call("Network.enable")
    browser.call("Network.setBlockedURLs", urls=["*/session"])
    browser.open(gateway.url)
    browser.until("document.querySelector('#live').textContent.endsWith('trying again …')")
    browser.call("Network.setBlockedURLs", urls=[])
    browser.until("document.querySelector('#live').className === 'on'")


def contrast(browser: Browser, selector: str) -> float:
    """Contrast of an element's text against what is behind it (WCAG 2.2, "contrast ratio")."""
    colours: list[list[int]] = browser.js(
        f"""(() => {{
          const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
          const first = document.querySelector({json.dumps(selector)});
          let behind = first;
          while (behind && numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
          const back = getComputedStyle(behind ?? document.body).backgroundColor;
          return [numbers(getComputedStyle(first).color), numbers(back)];
        }})()"""
    )

    def luminance(colour: list[Any]) -> float:
        parts = [part / 255 for part in colour[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])

    light, dim = sorted((luminance(colour) for colour in colours), reverse=True)
    return (light + 0.05) / (dim + 0.05)


def test_the_api_page_shows_every_operation(browser: Browser, gateway: RunningGateway) -> None:
    browser.open(f"{gateway.url}/docs")
    count = sum(len(methods) for methods in gateway.get("/openapi.json").json()["paths"].values())
    browser.until(f"document.querySelectorAll('#paths details').length === {count}")
    assert "/v1/decodes/{id}" in browser.text()
