"""Every Redis key and its lifetime. No key literal stands anywhere else (the Lua scripts get the prefixes).

Schema (`latentq:` is our prefix, `rq:` RQ's own, which `RQ_KEY_PREFIX` may change)::

    key                       type    what                                   lifetime
    latentq:job:<id>          hash    the job's record                       none while live; then retention + tombstone
    latentq:attempts:<id>     list    one JSON per attempt that ended badly  as the record
    latentq:blob:<name>       string  latents or an artifact                 provisional TTL → none while owned by a
                                                                             live job → the last owner's retention
    latentq:owners:<name>     zset    job id → ms until which it needs       as the blob
                                      the blob (inf: while it lives);
                                      <store>/<name> for a blob outside
    latentq:external:<store>  zset    name of a blob outside Redis → ms      member goes when the janitor dooms it
                                      until which it stays (inf: while a
                                      live job owns it)
    latentq:doomed:<store>    zset    name of a blob outside Redis that      member goes when the janitor has deleted
                                      nobody can own any more → ms since     the blob
    latentq:stores            hash    id of the store outside Redis → URL    owned by whoever set the store up
                                      (`new`: given out, not seen yet)       (docs/blob-stores.md says how to move)
    latentq:preview:<id>      string  JPEG of a job's first picture, by a    1 h
                                      small VAE
    latentq:leases            zset    job id → end of its lease, ms          member goes when the job leaves processing
    latentq:retention         zset    job id → end of its retention, ms      member goes when the janitor retires it
    latentq:submitted         zset    job id → ms at which it was accepted   member goes when the janitor retires it
    latentq:deadlines         zset    job id → start deadline, ms            member goes when the job ends, or when the
                                                                             janitor finds the time past
    latentq:parked            zset    job id → schema_version it needs       member goes when a newer worker takes it
    latentq:totals            hash    live jobs: count, latents and          owned by the scripts; five fields
                                      reserved bytes, pixels, webhooks
    latentq:claim:<worker>    hash    token and answer of its last claim     1 h
    latentq:bell:<vae>        list    wakes idle workers; holds no ids       1 h, trimmed to 64
    latentq:serving:<vae>     zset    worker → ms until which it serves      member expires by score; 1 h
    latentq:worker:<name>     hash    what a live worker reports             a few leases
    latentq:paused            set     VAEs whose queues nobody claims from   owned by `latentq pause`/`resume`
    latentq:reaper            hash    who reaps, since when, grace           1 h
    latentq:janitor           string  the janitor that leads                 2.5 s, renewed every second
    latentq:tally:<vae>       hash    outcomes and times of ended jobs       owned by the scripts; some fifty fields
    latentq:pulse:<quarter>   hash    the same, of a quarter of a minute     1 h
    latentq:keys              hash    key id → name, digest, scopes, quotas  owned by `latentq keys`
    latentq:session:<digest>  string  a browser's session: key id, token     12 h
    latentq:sessions:<key>    zset    digests of a key's sessions → ms       12 h from the last one's begin
    latentq:rate:<key>        string  when a key may ask again (GCRA), µs    until then
    latentq:spent:<token>     string  a submit that was let in by its rate   1 min
    latentq:quota:<key>:<day> set     ids a key submitted on a day (UTC)     2 days
    latentq:index:<key>       zset    ids a key submitted → ms               as the longest-lived of its jobs
    latentq:delivery:<id>     hash    one event on its way to a receiver:    while it is tried + as a dead letter;
                                      what, where to, every attempt          1 h once delivered
    latentq:outbox            zset    deliveries that have not ended → ms    member goes when it is delivered or buried
                                      at which they are given up
    latentq:receivers         zset    receiver (scheme, host, port) → ms     member goes with its last delivery
                                      at which it is worth a look
    latentq:due:<receiver>    zset    deliveries that wait → ms              member goes when a courier takes it
    latentq:sending:<receiver> zset   deliveries a courier has → end of      member goes with the attempt, or with the
                                      its lease, ms                          lease
    latentq:breaker:<receiver> hash   silences in a row, and until when      1 day, or until it answers
                                      the receiver is left alone
    latentq:stopped           zset    endpoints that answered 410 → ms       `latentq webhooks enable`; the last 10,000
    latentq:dead-letters      zset    deliveries that were given up → ms     member goes at that time
                                      until which they are kept
    latentq:webhook-counts    hash    how deliveries and attempts ended      owned by the scripts; five fields
    latentq:webhook-secret:<owner> hash secrets that sign webhooks of a job  of a job: none while it lives, then as its
                                      (`job:<id>`), a gateway's key          delivery; else 400 days from the last use
                                      (`key:<id>`), or all others (`default`)
    latentq:couriers          zset    courier → ms until which it lives      member expires by score; 1 h
    latentq:courier:<name>    hash    token and answer of its last claim     1 h
    latentq:courier-bell      list    wakes idle couriers                    1 h, trimmed to 16
    latentq:ended             channel the id of each job that ends; nothing  none
                                      depends on its being heard

Times are milliseconds by the broker's own clock (`TIME`); no host's clock decides anything.
"""

from __future__ import annotations

from enum import StrEnum

from rq.defaults import RQ_KEY_PREFIX

PREFIX = "latentq:"
RQ_PREFIX = RQ_KEY_PREFIX + ":"

#: RQ queues are named `latentq.<vae>.<priority>`, so a KEDA scaler sees `rq:queue:latentq.sdxl.normal`.
QUEUE_PREFIX = "latentq."


class Priority(StrEnum):
    """Priorities, most urgent first."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


LEASES = PREFIX + "leases"
RETENTION = PREFIX + "retention"
SUBMITTED = PREFIX + "submitted"
DEADLINES = PREFIX + "deadlines"
PARKED = PREFIX + "parked"
TOTALS = PREFIX + "totals"
PAUSED = PREFIX + "paused"
REAPER = PREFIX + "reaper"
JANITOR = PREFIX + "janitor"
API_KEYS = PREFIX + "keys"
#: A channel, not a key.
ENDED_CHANNEL = PREFIX + "ended"
OUTBOX = PREFIX + "outbox"
RECEIVERS = PREFIX + "receivers"
STOPPED = PREFIX + "stopped"
DEAD_LETTERS = PREFIX + "dead-letters"
WEBHOOK_COUNTS = PREFIX + "webhook-counts"
COURIERS = PREFIX + "couriers"
COURIER_BELL = PREFIX + "courier-bell"
STORES = PREFIX + "stores"
RQ_QUEUES = RQ_PREFIX + "queues"
RQ_WORKERS = RQ_PREFIX + "workers"
RQ_SUSPENDED = RQ_PREFIX + "suspended"


def queue_name(vae: str, priority: str) -> str:
    """RQ's name of the queue that jobs of this VAE and priority wait in."""
    return f"{QUEUE_PREFIX}{vae}.{priority}"


def queue_names(vae: str) -> list[str]:
    """The queues of one VAE, most urgent first."""
    return [queue_name(vae, priority) for priority in Priority]


def split_queue_name(name: str) -> tuple[str, str]:
    """VAE and priority of a queue name made by `queue_name`."""
    vae, _, priority = name.removeprefix(QUEUE_PREFIX).rpartition(".")
    return vae, priority


def job(job_id: str) -> str:
    return f"{PREFIX}job:{job_id}"


def attempts(job_id: str) -> str:
    return f"{PREFIX}attempts:{job_id}"


def blob(name: str) -> str:
    return f"{PREFIX}blob:{name}"


def preview(job_id: str) -> str:
    return f"{PREFIX}preview:{job_id}"


def owners(name: str) -> str:
    return f"{PREFIX}owners:{name}"


def external(store: str) -> str:
    return f"{PREFIX}external:{store}"


def doomed(store: str) -> str:
    return f"{PREFIX}doomed:{store}"


def claim_memo(worker: str) -> str:
    return f"{PREFIX}claim:{worker}"


def bell(vae: str) -> str:
    return f"{PREFIX}bell:{vae}"


def serving(vae: str) -> str:
    return f"{PREFIX}serving:{vae}"


def worker(name: str) -> str:
    return f"{PREFIX}worker:{name}"


def tally(vae: str) -> str:
    return f"{PREFIX}tally:{vae}"


def pulse(quarter: int) -> str:
    return f"{PREFIX}pulse:{quarter}"


def session(digest: str) -> str:
    return f"{PREFIX}session:{digest}"


def sessions(key_id: str) -> str:
    return f"{PREFIX}sessions:{key_id}"


def rate(key_id: str) -> str:
    return f"{PREFIX}rate:{key_id}"


def spent(token: str) -> str:
    return f"{PREFIX}spent:{token}"


def quota(key_id: str, day: str) -> str:
    return f"{PREFIX}quota:{key_id}:{day}"


def index(key_id: str) -> str:
    return f"{PREFIX}index:{key_id}"


def delivery(delivery_id: str) -> str:
    return f"{PREFIX}delivery:{delivery_id}"


def due(receiver: str) -> str:
    return f"{PREFIX}due:{receiver}"


def sending(receiver: str) -> str:
    return f"{PREFIX}sending:{receiver}"


def breaker(receiver: str) -> str:
    return f"{PREFIX}breaker:{receiver}"


def webhook_secret(owner: str) -> str:
    return f"{PREFIX}webhook-secret:{owner}"


def courier(name: str) -> str:
    return f"{PREFIX}courier:{name}"


def rq_queue(name: str) -> str:
    return f"{RQ_PREFIX}queue:{name}"


def rq_job(job_id: str) -> str:
    return f"{RQ_PREFIX}job:{job_id}"


def rq_results(job_id: str) -> str:
    return f"{RQ_PREFIX}results:{job_id}"


def rq_registry(kind: str, queue: str) -> str:
    """RQ's registry of a queue: `wip` holds `<id>:<execution>`; `finished`, `failed`, `canceled` hold ids."""
    return f"{RQ_PREFIX}{kind}:{queue}"


def rq_worker(name: str) -> str:
    return f"{RQ_PREFIX}worker:{name}"
