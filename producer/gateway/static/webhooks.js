// Webhooks on the status page: how many are on their way, and those that were given up, to be sent again.

const GONE = 410;
const sent = new Set();
let shown = "";

export function showWebhooks(webhooks, tools) {
  const section = document.getElementById("webhooks-section");
  section.hidden = !webhooks.dead.length && !webhooks.pending && !webhooks.couriers;
  document.getElementById("webhooks-now").textContent = now(webhooks, tools.seconds);
  // A delivery that is given up once more has one more attempt, and may be sent again.
  const key = JSON.stringify(webhooks.dead.map((delivery) => [delivery.id, delivery.attempts.length]));
  if (key === shown) return;
  shown = key;
  const items = webhooks.dead.map((delivery) => item(delivery, tools));
  document.getElementById("webhooks").replaceChildren(...(items.length ? items : [tools.make("li", { text: "None was given up.", cls: "empty" })]));
}

function now(webhooks, seconds) {
  if (webhooks.pending === null) return "";
  const parts = [`${webhooks.pending} on their way`, `${webhooks.dead_letters} given up`];
  if (webhooks.pending && !webhooks.couriers) parts.push("no courier runs");
  else if (webhooks.overdue_s > 10) parts.push(`the oldest waits for ${seconds(webhooks.overdue_s)}`);
  return parts.join(" · ");
}

function item(delivery, { make, call, seconds }) {
  const last = delivery.attempts.at(-1);
  const gone = last?.status === GONE;
  const count = `${delivery.attempts.length} ${delivery.attempts.length === 1 ? "attempt" : "attempts"}`;
  const ended = last ? ` · the last one ${new Date(last.at).toLocaleString()}, after ${seconds(last.duration_ms / 1000)}: ${last.error ?? last.status}` : "";
  const text = make("div", {}, make("b", { text: `${delivery.event} · ${delivery.receiver}` }), make("div", { text: delivery.reason ?? "" }),
    make("small", { text: `${delivery.job_id ?? "ping"} · ${count}${ended}` }));
  const button = make("button", { type: "button", text: gone ? "Enable and send again" : "Send again", "aria-label": `Send ${delivery.id} again` });
  button.addEventListener("click", () => again(delivery, button, { call, gone }));
  const mark = `${delivery.id} ${delivery.attempts.length}`;
  if (sent.has(mark)) settle(button);
  return make("li", { "data-delivery": delivery.id }, text, button);
}

async function again(delivery, button, { call, gone }) {
  button.disabled = true;
  try {
    if (gone) await call(delivery.urls.enable, { method: "POST" });
    await call(delivery.urls.redeliver, { method: "POST" });
    sent.add(`${delivery.id} ${delivery.attempts.length}`);
    settle(button);
  } catch (error) {
    button.disabled = false;
    button.title = error.message;
    button.textContent = `Not now: ${error.message}`;
  }
}

function settle(button) {
  button.disabled = true;
  button.textContent = "On its way";
}
