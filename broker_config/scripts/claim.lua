-- Takes the head of a queue and, when allowed, the jobs behind it in the same bucket.
-- ARGV: token, worker, lease_ms, max_jobs, window, ageing_ms, schema_version, deadline_exc, default mode,
--   foreign_exc, foreign_ttl_ms, along_bytes (latents up to this size come along), then for each VAE: its name and the
--   pixels of one batch. Queues of a VAE are tried high, normal, low.
-- The token makes it safe to send again: the same token gets the same answer, and the one before it, which can only
-- be a copy that was late on its way, gets nothing.
-- Returns {{id, message, rq_data, attempt, crashes, latents or ''}, …}
local token, worker, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local max_jobs, window = tonumber(ARGV[4]), tonumber(ARGV[5])
local ageing_ms, schema, deadline_exc, default_mode = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8], ARGV[9]
local foreign_exc, foreign_ttl_ms, along_bytes = ARGV[10], tonumber(ARGV[11]), tonumber(ARGV[12])
local memo = P .. 'claim:' .. worker
local now = now_ms()

-- '': they are large, lie outside, or are not there; whoever reads them finds out. Nothing may raise here: the jobs are
-- claimed already, and nobody would hear of them.
local function latents_of(rec)
  local size = tonumber(rec.latents_bytes)
  if not size or size > along_bytes or not rec.blob or outside(rec.blob) then return '' end
  local bytes = redis.pcall('GET', P .. 'blob:' .. rec.blob)
  return type(bytes) == 'string' and bytes or ''
end

local function answer(ids)
  local out = {}
  for _, id in ipairs(ids) do
    local rec = record(id)
    if rec and rec.execution == token and rec.state == 'processing' then
      out[#out + 1] = { id, rec.message, call('HGET', RQ .. 'job:' .. id, 'data') or '', rec.attempts or '1',
        rec.crashes or '0', latents_of(rec) }
    end
  end
  return out
end

local last = call('HMGET', memo, 'token', 'ids', 'before')

-- Also when nothing was claimed: a copy of this call that comes late must not claim what nobody would hear of.
local function remember(ids)
  call('HSET', memo, 'token', token, 'ids', cjson.encode(ids), 'before', last[1] or '')
  call('EXPIRE', memo, 3600)
end

if last[1] == token then return answer(cjson.decode(last[2])) end
if last[3] == token then return {} end
if call('EXISTS', RQ .. 'suspended') == 1 then return {} end

-- A job that someone enqueued here with RQ itself: nobody can run it, so it fails, as RQ's own worker would fail it.
local function fail_foreign(queue, id)
  local job, results = RQ .. 'job:' .. id, RQ .. 'results:' .. id
  local own_ttl = tonumber(call('HGET', job, 'failure_ttl'))
  local ttl = own_ttl and own_ttl > 0 and own_ttl * 1000 or foreign_ttl_ms
  call('HSET', job, 'status', 'failed', 'ended_at', utc(now))
  call('PEXPIRE', job, int(ttl))
  call('ZADD', RQ .. 'failed:' .. queue, int((now + ttl) / 1000), id)
  call('XADD', results, 'MAXLEN', '10', '*', 'type', RQ_RESULT.failed, 'worker_name', worker, 'exc_string', foreign_exc)
  call('PEXPIRE', results, int(ttl))
end

local function too_new(rec) return tonumber(rec.schema) > schema end

-- Whether the last attempt failed here, for a reason of this worker, and another live one serves the VAE. With nobody
-- else, it is tried here again.
local function better_elsewhere(rec, vae)
  if rec.avoid ~= worker then return false end
  for _, other in ipairs(call('ZRANGEBYSCORE', P .. 'serving:' .. vae, int(now), '+inf')) do
    if other ~= worker then return true end
  end
  return false
end

-- Takes off a queue what may not run: an id whose job is not queued (a duplicate, a job someone ended), a job whose
-- start deadline passed, one that needs a newer worker, one that is not ours.
local function take_off(queue, id, rec, status)
  if rec and rec.state == 'queued' and status == 'queued' and not too_new(rec) then
    return fail_late(rec, now, deadline_exc)
  end
  call('LREM', RQ .. 'queue:' .. queue, 1, id)
  if status ~= 'queued' then return end
  if not rec then
    fail_foreign(queue, id)
  elseif rec.state == 'queued' then
    call('ZADD', P .. 'parked', rec.schema, id)
  end
end

-- The first id of a queue that may run, but for jobs that are better off elsewhere. Those that may not are taken off,
-- though not too many at once: nobody else is served meanwhile, and ending a job takes some thirty commands.
local drops_left = 100
local function head_of(queue, vae)
  local key, passed = RQ .. 'queue:' .. queue, 0
  while passed < window do
    local id = call('LINDEX', key, passed)
    if not id then return nil end
    local rec = record(id)
    local status = rq_status(id)
    local runs = rec and rec.state == 'queued' and status == 'queued' and not too_new(rec) and not is_late(rec, now)
    if runs then
      if not better_elsewhere(rec, vae) then return rec end
      passed = passed + 1
    else
      if drops_left == 0 then
        ring(vae)
        return nil
      end
      drops_left = drops_left - 1
      take_off(queue, id, rec, status)
    end
  end
end

local best, best_rank, max_px
for i = 13, #ARGV, 2 do
  local vae = ARGV[i]
  if call('SISMEMBER', P .. 'paused', vae) == 0 then
    for rank, priority in ipairs({ 'high', 'normal', 'low' }) do
      local rec = head_of('latentq.' .. vae .. '.' .. priority, vae)
      if rec then
        local effective = now - tonumber(rec.submitted_ms) > ageing_ms and 0 or rank
        if not best or effective < best_rank
          or (effective == best_rank and tonumber(rec.submitted_ms) < tonumber(best.submitted_ms)) then
          best, best_rank, max_px = rec, effective, tonumber(ARGV[i + 1])
        end
      end
    end
  end
end
if not best then
  remember({})
  return {}
end

local chosen, px = { best }, tonumber(best.px)
-- A job that was on the device when a process died runs alone, so that it can kill nobody else's attempt.
local mode = best.mode ~= '' and best.mode or default_mode
if mode == 'fast' and max_jobs > 1 and (best.crashes or '0') == '0' then
  for _, id in ipairs(call('LRANGE', RQ .. 'queue:' .. best.rq_queue, 1, window)) do
    if #chosen >= max_jobs then break end
    local rec = record(id)
    if rec and rec.state == 'queued' and rec.bucket == best.bucket and (rec.crashes or '0') == '0'
      and rec.avoid ~= worker and px + tonumber(rec.px) <= max_px and not too_new(rec) and not is_late(rec, now)
      and rq_status(id) == 'queued' then
      local twice = false
      for _, other in ipairs(chosen) do twice = twice or other.id == id end
      if not twice then
        chosen[#chosen + 1] = rec
        px = px + tonumber(rec.px)
      end
    end
  end
end

local ids, at, stamp = {}, string.format('%.3f', now / 1000), utc(now)
for _, rec in ipairs(chosen) do
  local id, queue = rec.id, rec.rq_queue
  ids[#ids + 1] = id
  call('LREM', RQ .. 'queue:' .. queue, 1, id)
  call('HSET', P .. 'job:' .. id, 'state', 'processing', 'execution', token, 'worker', worker,
    'started_ms', int(now), 'stage', 'claimed')
  call('HINCRBY', P .. 'job:' .. id, 'attempts', 1)
  call('ZADD', LEASES, int(now + lease_ms), id)
  call('HSET', RQ .. 'job:' .. id, 'status', 'started', 'started_at', stamp, 'last_heartbeat', stamp,
    'worker_name', worker)
  call('PERSIST', RQ .. 'job:' .. id)
  -- Never expires by score: RQ's own sweep judges by the clock of whichever host runs it.
  call('ZADD', RQ .. 'wip:' .. queue, '+inf', id .. ':' .. token)
  call('HSET', RQ .. 'execution:' .. id .. ':' .. token, 'id', token, 'job_id', id, 'created_at', at,
    'last_heartbeat', at, 'worker_name', worker)
  call('PEXPIRE', RQ .. 'execution:' .. id .. ':' .. token, int(lease_ms * 4))
  call('ZADD', RQ .. 'executions:' .. id, '+inf', token)
  call('PEXPIRE', RQ .. 'executions:' .. id, int(lease_ms * 4))
  call('SADD', RQ .. 'worker:' .. worker .. ':executions', id .. ':' .. token)
  announce(rec, 'processing', now)
end
call('PEXPIRE', RQ .. 'worker:' .. worker .. ':executions', int(lease_ms * 4))
remember(ids)
return answer(ids)
