// The status page: logs in where that is needed, then shows what /v1/overview/events says, as it changes.
// Everything from outside becomes text nodes and attributes, never markup.

import { draw } from "./charts.js";
import { showWebhooks } from "./webhooks.js";

const $ = (id) => document.getElementById(id);
let csrf = null;
let stream = null;

function make(kind, { text, cls, ...attributes } = {}, ...children) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (cls) made.className = cls;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.0995) return `${Math.round(value * 1000)} ms`;
  if (value < 9.95) return `${value.toFixed(1)} s`;
  if (value < 120) return `${Math.round(value)} s`;
  return value < 7200 ? `${Math.floor(value / 60)} min` : `${Math.floor(value / 3600)} h`;
}

function bytes(value) {
  return value < 1024 ? `${value} B` : value < 1048576 ? `${(value / 1024).toFixed(0)} KiB` : `${(value / 1048576).toFixed(1)} MiB`;
}

async function call(path, { method = "GET", body, type } = {}) {
  const headers = {};
  if (type) headers["Content-Type"] = type;
  if (csrf && method !== "GET") headers["X-CSRF-Token"] = csrf;
  const answer = await fetch(path, { method, body, headers, credentials: "same-origin" });
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({ detail: `status ${answer.status}` }));
    throw Object.assign(new Error(problem.detail), { status: answer.status });
  }
  return answer.status === 204 ? null : answer.json();
}

// Logging in ------------------------------------------------------------------------------------------------

async function begin() {
  try {
    await enter();
  } catch (error) {
    say(`${error.message}: trying again …`, "off");
    setTimeout(begin, 3000);
  }
}

async function enter() {
  let session;
  try {
    session = await call("/session");
  } catch (error) {
    if (error.status !== 401) throw error;
    $("login").hidden = false;
    $("main").hidden = true;
    say("log in to see the queue", "");
    $("token").focus();
    return;
  }
  csrf = session.csrf;
  $("login").hidden = true;
  $("main").hidden = false;
  $("logout").hidden = !session.csrf;
  $("drop").closest("section").hidden = !session.scopes.includes("submit");
  await fillVaes();
  listen();
}

$("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("login-error").textContent = "";
  try {
    await call("/session", { method: "POST", body: JSON.stringify({ token: $("token").value.trim() }), type: "application/json" });
    $("token").value = "";
    await begin();
  } catch (error) {
    $("login-error").textContent = error.message;
  }
});

$("logout").addEventListener("click", async () => {
  stream?.close();
  await call("/session", { method: "DELETE" });
  location.reload();
});

// Live ------------------------------------------------------------------------------------------------------

function say(text, state) {
  $("live").textContent = text;
  $("live").className = state;
}

function listen() {
  stream?.close();
  stream = new EventSource("/v1/overview/events");
  stream.addEventListener("overview", (event) => show(JSON.parse(event.data)));
  stream.addEventListener("error", () => {
    say("not connected, trying again …", "off");
    if (stream.readyState === EventSource.CLOSED) setTimeout(begin, 3000);
  });
}

function show(overview) {
  const queued = overview.queues.reduce((sum, queue) => sum + queue.queued, 0);
  const running = overview.queues.reduce((sum, queue) => sum + queue.processing, 0);
  say(`live · ${queued} queued, ${running} running`, "on");
  showCharts(overview.points);
  showQueues(overview.queues);
  $("workers-section").hidden = overview.workers === null;
  showWorkers(overview.workers ?? []);
  showFailed(overview.failed);
  showWebhooks(overview.webhooks, { make, call, seconds });
  showGallery(overview.recent);
}

function showCharts(points) {
  // The running quarter is not over: it would look like a drop.
  const whole = points.slice(0, -1);
  const rates = whole.map((point) => point.succeeded * 4);
  draw($("chart-rate"), rates, { bad: whole.map((point) => point.failed * 4) });
  $("rate").textContent = String(points.slice(-5, -1).reduce((sum, point) => sum + point.succeeded, 0));
  for (const name of ["wait", "decode"]) {
    draw($(`chart-${name}`), whole.map((point) => point[`${name}_s`]), { text: seconds });
    const last = points.map((point) => point[`${name}_s`]).filter((value) => value !== null).pop();
    $(name).textContent = seconds(last);
  }
}

function rows(body, items, columns, nothing, makeRow) {
  body.replaceChildren(...(items.length ? items.map(makeRow) : [make("tr", {}, make("td", { text: nothing, cls: "empty", colspan: columns }))]));
}

function showQueues(queues) {
  rows($("queues"), queues, 7, "Nothing was submitted yet.", (queue) => {
    const name = make("td", { text: queue.vae, cls: "name" });
    if (queue.paused) name.append(make("span", { text: "paused", cls: "tag" }));
    if (queue.queued && !queue.workers) name.append(make("span", { text: "no worker", cls: "tag" }));
    if (queue.parked) name.append(make("span", { text: `${queue.parked} parked`, cls: "tag" }));
    return make("tr", {}, name, make("td", { text: queue.priority }), make("td", { text: queue.queued, cls: "n" }),
      make("td", { text: seconds(queue.oldest_s), cls: "n" }), make("td", { text: queue.processing, cls: "n" }),
      make("td", { text: queue.failed, cls: "n" }), make("td", { text: queue.workers, cls: "n" }));
  });
}

function showWorkers(workers) {
  rows($("workers"), workers, 5, "No live worker.", (worker) => make("tr", {}, make("td", { text: worker.name, cls: "name" }),
    make("td", { text: worker.vaes.join(", ") }), make("td", { text: worker.device }),
    make("td", { text: worker.busy_share === null ? "–" : `${Math.round(worker.busy_share * 100)} %`, cls: "n" }),
    make("td", { text: worker.jobs, cls: "n" })));
}

// Results ---------------------------------------------------------------------------------------------------

function size(job) {
  const frames = job.num_frames > 1 ? ` × ${job.num_frames}` : "";
  return job.width ? `${job.width}×${job.height}${frames}` : "";
}

function media(job, output, { controls = false } = {}) {
  if (output.content_type.startsWith("image/")) return make("img", { src: output.url, alt: `Result of ${job.id}`, loading: "lazy" });
  if (output.content_type.startsWith("video/")) {
    const video = make("video", { src: output.url, preload: "metadata", "aria-label": `Result of ${job.id}` });
    video.controls = controls;
    video.muted = true;
    video.loop = true;
    return video;
  }
  const link = make("span", { text: `${output.extension}, ${bytes(output.size_bytes)}` });
  return controls ? make("a", { href: output.url, download: "" }, link) : link;
}

const shown = new Map();

function showGallery(jobs) {
  const list = $("gallery");
  if (!jobs.length) { shown.clear(); list.replaceChildren(make("li", { text: "Nothing yet.", cls: "empty" })); return; }
  // What is there stays, so that pictures do not flicker and focus is kept.
  const items = jobs.map((job) => shown.get(job.id) ?? card(job));
  shown.clear();
  jobs.forEach((job, index) => shown.set(job.id, items[index]));
  if (items.length !== list.children.length || items.some((item, index) => list.children[index] !== item)) list.replaceChildren(...items);
}

function card(job) {
  const button = make("button", { type: "button", "aria-label": `Show ${job.id}` },
    make("div", { cls: "thumb" }, job.outputs.length ? media(job, job.outputs[0]) : "no output"),
    make("div", { cls: "what" }, make("b", { text: `${job.vae} · ${size(job)}` }), make("span", { text: job.metadata.prompt ?? job.id }),
      make("span", { text: `${seconds(job.timings_s.decode)} decode · ${new Date(job.ended_at).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })}` })));
  button.addEventListener("click", () => view(job));
  return make("li", {}, button);
}

function view(job) {
  $("viewer-title").textContent = job.id;
  $("viewer-picture").replaceChildren(...job.outputs.map((output) => media(job, output, { controls: true })));
  const facts = {
    VAE: `${job.vae}, ${job.layout}`, size: `${job.batch} × ${size(job)} → ${job.output}`, mode: job.decoded_by.mode, device: job.decoded_by.device,
    dtype: job.decoded_by.dtype, ...Object.fromEntries(Object.entries(job.timings_s).map(([name, value]) => [name, seconds(value)])),
    attempts: job.attempts, submitted: new Date(job.created_at).toLocaleString(), "kept until": new Date(job.expires_at).toLocaleString(), ...job.metadata,
  };
  $("viewer-facts").replaceChildren(...Object.entries(facts).filter(([, value]) => value !== undefined && value !== null)
    .flatMap(([name, value]) => [make("dt", { text: name }), make("dd", { text: value })]));
  $("viewer").showModal();
}

$("viewer-close").addEventListener("click", () => $("viewer").close());
$("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });

// Failed ----------------------------------------------------------------------------------------------------

const again = new Map();
let failedShown = "";

function showFailed(jobs) {
  const key = JSON.stringify(jobs.map((job) => [job.id, again.get(job.id)]));
  if (key === failedShown) return;
  failedShown = key;
  const items = jobs.map((job) => {
    const error = job.errors[job.errors.length - 1] ?? { code: "error", message: "" };
    const text = make("div", {}, make("b", { text: `${job.vae} · ${error.code}` }), make("div", { text: error.message }),
      make("small", { text: `${job.id} · ${size(job)} · ${job.attempts} ${job.attempts === 1 ? "attempt" : "attempts"}` }));
    const button = make("button", { type: "button", text: again.get(job.id) ?? "Decode again", "aria-label": `Decode ${job.id} again` });
    button.disabled = again.has(job.id);
    button.addEventListener("click", () => redecode(job, button));
    return make("li", { "data-job": job.id }, text, button);
  });
  $("failed").replaceChildren(...(items.length ? items : [make("li", { text: "None.", cls: "empty" })]));
}

async function redecode(job, button) {
  button.disabled = true;
  try {
    await call(`${job.urls.redecode}`, { method: "POST" });
    again.set(job.id, "Submitted again");
  } catch (error) {
    button.disabled = false;
    again.delete(job.id);
    button.title = error.message;
    button.textContent = `Not now: ${error.message}`;
    return;
  }
  button.textContent = again.get(job.id);
}

// Dropping a file -------------------------------------------------------------------------------------------

let chosen = null;

async function fillVaes() {
  const { vaes } = await call("/v1/vaes");
  vaes.sort((one, other) => Number(other.served) - Number(one.served));
  $("vae").replaceChildren(...vaes.map((vae) => make("option", { value: vae.name, text: vae.served ? vae.name : `${vae.name} (no worker)` })));
}

function choose(file) {
  chosen = file ?? null;
  $("zone-text").textContent = chosen ? `${chosen.name} · ${bytes(chosen.size)}` : "Drop a .safetensors file of latents here, or choose one";
}

const zone = document.querySelector(".zone");
for (const name of ["dragenter", "dragover"]) zone.addEventListener(name, (event) => { event.preventDefault(); zone.classList.add("over"); });
for (const name of ["dragleave", "drop"]) zone.addEventListener(name, () => zone.classList.remove("over"));
zone.addEventListener("drop", (event) => { event.preventDefault(); choose(event.dataTransfer.files[0]); });
$("file").addEventListener("change", () => choose($("file").files[0]));

$("drop").addEventListener("submit", async (event) => {
  event.preventDefault();
  const status = $("drop-status");
  $("drop-result").replaceChildren();
  status.className = "";
  if (!chosen) { status.textContent = "Choose a file first."; return; }
  const options = new URLSearchParams({ vae: $("vae").value });
  for (const name of ["output", "height", "width"]) if ($(name).value) options.set(name, $(name).value);
  try {
    status.textContent = "sending …";
    let job = await call(`/v1/decodes?${options}`, { method: "POST", body: chosen, type: "application/vnd.safetensors" });
    while (["queued", "processing"].includes(job.status)) {
      status.textContent = job.served ? `${job.status} …` : `queued: no worker serves ${job.vae} now`;
      job = await call(`${job.urls.self}?wait=10`);
    }
    if (job.status !== "succeeded") throw new Error(job.errors.at(-1)?.message ?? job.status);
    status.textContent = `${size(job)}, decoded in ${seconds(job.timings_s.decode)}`;
    $("drop-result").replaceChildren(...job.outputs.map((output) => media(job, output, { controls: true })));
  } catch (error) {
    status.className = "error";
    status.textContent = error.message;
  }
});

for (const [id, name] of [["chart-rate", "Jobs a minute"], ["chart-wait", "Seconds waited"], ["chart-decode", "Seconds of decode"]]) $(id).dataset.name = name;
begin();
