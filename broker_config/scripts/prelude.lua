-- Shared by every script. `{{prefix}}` and `{{rq}}` are filled in when the scripts are loaded.
-- The record (latentq:job:<id>) and RQ's hash (rq:job:<id>) always change in the same script, so there is
-- no moment at which one of them is ahead. Times are ms by the broker's clock.
local P, RQ = '{{prefix}}', '{{rq}}'
local TOTALS, LEASES, RETENTION = P .. 'totals', P .. 'leases', P .. 'retention'
local DEADLINES, SUBMITTED = P .. 'deadlines', P .. 'submitted'
local OUTBOX, RECEIVERS = P .. 'outbox', P .. 'receivers'
local announce, webhook_ended -- outbox.lua

local function call(...) return redis.call(...) end

-- Lua would write 1.7954e+12; Redis must get every digit.
local function int(n) return string.format('%.0f', n) end

local function now_ms()
  local t = call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- ISO-8601 as RQ's utcformat writes it. Days to date: Howard Hinnant, "chrono-Compatible Low-Level Date
-- Algorithms", civil_from_days.
local function utc(ms)
  local s = math.floor(ms / 1000)
  local r = s % 86400
  local z = (s - r) / 86400 + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%03d000Z', year, month, day,
    math.floor(r / 3600), math.floor(r % 3600 / 60), r % 60, ms % 1000)
end

-- A key of another kind in its place is no record: a claim or a renewal that raised would do so for every other job.
local function record(id)
  local flat, rec = redis.pcall('HGETALL', P .. 'job:' .. id), {}
  for i = 1, #flat, 2 do rec[flat[i]] = flat[i + 1] end
  rec.id = id
  return rec.state and rec or nil
end

-- What RQ's hash says of the job; nil: there is none.
local function rq_status(id)
  local status = redis.pcall('HGET', RQ .. 'job:' .. id, 'status')
  return type(status) == 'string' and status or nil
end

-- A blob is called by its name; one outside Redis by `<store>/<name>`, and `external:<store>` stands for its bytes
-- (broker_config/external_index.py).
local function outside(blob) return string.match(blob, '^([^/]+)/(.+)$') end

local function is_stored(blob)
  local store, name = outside(blob)
  if store then return call('ZSCORE', P .. 'external:' .. store, name) and true or false end
  return call('EXISTS', P .. 'blob:' .. blob) == 1
end

-- Bytes that came with the script itself are stored with it: there is no moment at which they lie here unowned.
local function store_inline(name, bytes)
  if bytes ~= '' and not is_stored(name) then call('SET', P .. 'blob:' .. name, bytes) end
end

-- Why a job is not accepted now: 'jobs' | 'latents' | 'webhooks' | 'receiver' | 'memory'; nil: it is. `incoming`: bytes that accepting it will
-- add to the broker at once.
local function refusal(limits, latents_bytes, reserved_bytes, incoming)
  local totals = call('HMGET', TOTALS, 'jobs', 'latents_bytes', 'reserved_bytes', 'webhooks')
  if (tonumber(totals[1]) or 0) + 1 > limits.jobs then return 'jobs' end
  if (tonumber(totals[2]) or 0) + latents_bytes > limits.latents_bytes then return 'latents' end
  -- Each job with a webhook that has not ended will have a delivery.
  if limits.webhooks and (tonumber(totals[4]) or 0) + call('ZCARD', OUTBOX) + 1 > limits.webhooks then
    return 'webhooks'
  end
  -- One receiver that is dead must not close the outbox to all the others.
  if limits.webhooks and call('ZCARD', P .. 'due:' .. limits.receiver) >= limits.webhooks / 4 then return 'receiver' end
  local memory = call('INFO', 'memory')
  local cap = tonumber(string.match(memory, '\nmaxmemory:(%d+)')) or 0
  if cap == 0 then return nil end
  local expected = tonumber(string.match(memory, 'used_memory:(%d+)')) + (tonumber(totals[3]) or 0)
  if expected + reserved_bytes + incoming > cap * limits.watermark then return 'memory' end
end

-- Lets blob `name` live exactly as long as its last owner needs it; without owners, no longer.
local function settle(name)
  local key, blob = P .. 'owners:' .. name, P .. 'blob:' .. name
  local last = call('ZREVRANGE', key, 0, 0, 'WITHSCORES')
  local store, file = outside(name)
  if store then call('ZADD', P .. 'external:' .. store, 'XX', last[2] or 0, file) end
  if #last == 0 then
    call('UNLINK', key, blob)
  elseif last[2] == 'inf' then
    call('PERSIST', key)
    call('PERSIST', blob)
  else
    local ttl = math.max(1, tonumber(last[2]) - now_ms())
    call('PEXPIRE', key, int(ttl))
    call('PEXPIRE', blob, int(ttl))
  end
end

-- Says until when `id` needs blob `name`; nil: no longer.
local function own(name, id, until_ms)
  if until_ms then call('ZADD', P .. 'owners:' .. name, until_ms, id) else call('ZREM', P .. 'owners:' .. name, id) end
  settle(name)
end

local function ring(vae, times)
  local bell = P .. 'bell:' .. vae
  for _ = 1, times or 1 do call('LPUSH', bell, '1') end
  call('LTRIM', bell, 0, 63)
  call('EXPIRE', bell, 3600)
end

-- Takes an attempt off every list that says it runs.
local function drop_execution(rec)
  call('ZREM', LEASES, rec.id)
  local execution = rec.execution
  if not execution or execution == '' then return end
  call('ZREM', RQ .. 'wip:' .. rec.rq_queue, rec.id .. ':' .. execution)
  call('DEL', RQ .. 'execution:' .. rec.id .. ':' .. execution)
  call('ZREM', RQ .. 'executions:' .. rec.id, execution)
  if rec.worker and rec.worker ~= '' then
    call('SREM', RQ .. 'worker:' .. rec.worker .. ':executions', rec.id .. ':' .. execution)
  end
end

-- Writes fields of RQ's hash, unless someone deleted it: a hash with these fields alone would have no TTL, and
-- RQ could not read it.
local function rq_set(id, ...)
  if call('EXISTS', RQ .. 'job:' .. id) == 1 then call('HSET', RQ .. 'job:' .. id, ...) end
end

-- Takes an ended job off the registries it may be in (RQ's tools move jobs without asking us). `how`: redis.call, or
-- redis.pcall, which goes on where a registry is of another kind.
local function unlist(rec, how)
  for _, registry in ipairs({ 'finished', 'failed', 'canceled' }) do
    (how or call)('ZREM', RQ .. registry .. ':' .. rec.rq_queue, rec.id)
  end
end

local RQ_STATUS = { succeeded = 'finished', failed = 'failed', canceled = 'canceled' }
local RQ_RESULT = { succeeded = '1', failed = '2', canceled = '3' }

-- What /metrics and the status page count: outcomes, and how long it took to wait, decode and encode; of each VAE since
-- ever, and of all for an hour. The bounds are those of broker_config/tally.py.
local BOUNDS_MS = { 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 300000, 900000 }
local function tally(rec, state, now, result)
  local whole, pulse = P .. 'tally:' .. rec.vae, P .. 'pulse:' .. int(math.floor(now / 15000))
  call('HINCRBY', whole, state, 1)
  call('HINCRBY', pulse, state, 1)
  call('EXPIRE', pulse, 3600)
  if state ~= 'succeeded' then return end
  local timings = result and cjson.decode(result).timings_s or {}
  local took = { wait = math.max(0, (tonumber(rec.started_ms) or now) - tonumber(rec.submitted_ms)),
    decode = (tonumber(timings.decode) or 0) * 1000, encode = (tonumber(timings.encode) or 0) * 1000 }
  for name, ms in pairs(took) do
    local slot = 1
    while BOUNDS_MS[slot] and ms > BOUNDS_MS[slot] do slot = slot + 1 end
    call('HINCRBY', whole, name .. ':' .. slot, 1)
    call('HINCRBY', whole, name .. ':ms', int(ms))
    call('HINCRBY', pulse, name .. ':ms', int(ms))
  end
end

-- A terminal state, once: record, RQ's hash, registry and result stream (whose entry wakes every waiter),
-- ownership, totals. `rq_field`, `rq_value`: what RQ's Result holds (return_value or exc_string).
-- Nothing is rolled back where a script raises. So once the state is written, what belongs to others (RQ's registries,
-- where someone may have put a key of another kind) must not keep the delivery, or the waiters, from being told.
local function finish(rec, state, now, rq_field, rq_value, result)
  local id, job, rq_job = rec.id, P .. 'job:' .. rec.id, RQ .. 'job:' .. rec.id
  local retention = tonumber(rec.retention_ms)
  local ends = now + retention
  if rec.state == 'queued' then
    call('LREM', RQ .. 'queue:' .. rec.rq_queue, 1, id)
    call('ZREM', P .. 'parked', id)
  end
  if rec.deadline_ms then call('ZREM', DEADLINES, id) end
  drop_execution(rec)

  call('HSET', job, 'state', state, 'ended_ms', int(now), 'expires_ms', int(ends), 'stage', '', 'cancel', '')
  if result then call('HSET', job, 'result', result) end
  call('PEXPIRE', job, int(retention + tonumber(rec.tombstone_ms)))
  call('PEXPIRE', P .. 'attempts:' .. id, int(retention + tonumber(rec.tombstone_ms)))
  call('ZADD', RETENTION, int(ends), id)
  own(rec.blob, id, int(ends))
  call('HINCRBY', TOTALS, 'jobs', -1)
  call('HINCRBY', TOTALS, 'latents_bytes', -tonumber(rec.latents_bytes))
  call('HINCRBY', TOTALS, 'reserved_bytes', -tonumber(rec.reserved_bytes))
  call('HINCRBY', TOTALS, 'px', -tonumber(rec.px or 0))

  local queue = rec.rq_queue
  unlist(rec, redis.pcall)
  if call('EXISTS', rq_job) == 1 then
    rq_set(id, 'status', RQ_STATUS[state], 'ended_at', utc(now), 'last_heartbeat', utc(now))
    call('PEXPIRE', rq_job, int(retention))
    local score = state == 'canceled' and int(now / 1000) or int(ends / 1000)
    redis.pcall('ZADD', RQ .. RQ_STATUS[state] .. ':' .. queue, score, id)
  end
  local entry = { 'type', RQ_RESULT[state], 'worker_name', rec.worker or '' }
  if rq_value then
    entry[#entry + 1] = rq_field
    entry[#entry + 1] = rq_value
  end
  if rec.execution and rec.execution ~= '' then
    for _, item in ipairs({ 'execution_id', rec.execution,
      'execution_started_at', string.format('%.3f', (tonumber(rec.started_ms) or now) / 1000),
      'execution_ended_at', string.format('%.3f', now / 1000) }) do entry[#entry + 1] = item end
  end
  redis.pcall('XADD', RQ .. 'results:' .. id, 'MAXLEN', '10', '*', unpack(entry))
  call('PEXPIRE', RQ .. 'results:' .. id, int(retention))

  tally(rec, state, now, result)
  webhook_ended(rec, state, now)
  -- Wakes those who wait for many jobs at a time. Lost rings are made up for by looking; a user of the broker who may
  -- not publish must still be able to end jobs.
  redis.pcall('PUBLISH', P .. 'ended', id)

  if rec.worker and rec.worker ~= '' and call('EXISTS', RQ .. 'worker:' .. rec.worker) == 1 then
    if state == 'succeeded' then call('HINCRBY', RQ .. 'worker:' .. rec.worker, 'successful_job_count', 1) end
    if state == 'failed' then call('HINCRBY', RQ .. 'worker:' .. rec.worker, 'failed_job_count', 1) end
    if rec.started_ms and rec.started_ms ~= '0' then
      call('HINCRBYFLOAT', RQ .. 'worker:' .. rec.worker, 'total_working_time',
        string.format('%.3f', (now - tonumber(rec.started_ms)) / 1000))
    end
  end
end

-- The fence. 'mine': this execution runs, or went back to the queue and nobody claimed it since.
local function fence(rec, execution)
  if not rec then return 'unknown' end
  if rec.execution ~= execution then return 'lost' end
  if rec.state == 'processing' or rec.state == 'queued' then return 'mine' end
  return 'ended'
end

-- No worker started it in time: it never will be.
local function fail_late(rec, now, exc_string)
  call('RPUSH', P .. 'attempts:' .. rec.id, cjson.encode({ code = 'start_deadline_passed', attempt = 0,
    message = 'no worker started the job within start_within_s', at_ms = now }))
  call('HINCRBY', P .. 'job:' .. rec.id, 'errors', 1)
  finish(rec, 'failed', now, 'exc_string', exc_string)
end

-- Whether the job must not start any more. One that was started before may go on as often as it needs.
local function is_late(rec, now)
  return rec.deadline_ms and tonumber(rec.deadline_ms) < now and (rec.attempts or '0') == '0'
end

-- queued: the id goes back into its queue (`side`: LPUSH = next, RPUSH = last). `execution`: the attempt that
-- may still take the job up again (it was cut off, not given up); '' for none. A job that someone canceled
-- meanwhile, through us or with RQ's own tools, ends instead. Returns 'queued' or 'canceled'.
local function requeue(rec, side, now, execution)
  local status = rq_status(rec.id)
  if rec.cancel == '1' or not status or status == 'canceled' or status == 'stopped' then
    finish(rec, 'canceled', now)
    return 'canceled'
  end
  drop_execution(rec)
  unlist(rec)
  call('HSET', P .. 'job:' .. rec.id, 'state', 'queued', 'queued_ms', int(now), 'stage', '', 'done', '0', 'total', '0',
    'execution', execution)
  call('HSET', RQ .. 'job:' .. rec.id, 'status', 'queued')
  call('PERSIST', RQ .. 'job:' .. rec.id)
  call('SADD', RQ .. 'queues', RQ .. 'queue:' .. rec.rq_queue) -- RQ's `Queue.delete` takes it out
  call(side, RQ .. 'queue:' .. rec.rq_queue, rec.id)
  -- Every worker hears it: one ring may go to a connection whose process or host has just died.
  ring(rec.vae, math.max(1, math.min(16, call('ZCARD', P .. 'serving:' .. rec.vae))))
  return 'queued'
end

-- An attempt that was given up for dead speaks again, and nobody claimed the job since: its process did not die,
-- so the crash that was counted is taken back.
local function revive(rec)
  if rec.state ~= 'queued' or rec.crashed_execution ~= rec.execution then return end
  call('HINCRBY', P .. 'job:' .. rec.id, 'crashes', -1)
  call('HDEL', P .. 'job:' .. rec.id, 'crashed_execution')
  call('RPOP', P .. 'attempts:' .. rec.id)
end

-- The ids that a gateway's key submitted today (UTC), or `ago` days before.
local function quota_of(key, ago)
  return P .. 'quota:' .. key .. ':' .. int(math.floor(call('TIME')[1] / 86400) - (ago or 0))
end

-- Whether the day has room for the job. One that is there, or counted, needs none.
local function may_enter(key, job, per_day)
  if per_day == 0 or call('EXISTS', P .. 'job:' .. job) == 1 then return true end
  return call('SISMEMBER', quota_of(key), job) == 1 or call('SCARD', quota_of(key)) < per_day
end

-- µs to the end of the day.
local function until_tomorrow()
  local time = call('TIME')
  return (86400 - time[1] % 86400) * 1000000 - time[2]
end
