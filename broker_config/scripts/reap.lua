-- Returns jobs whose lease ended. ARGV: janitor, lease_ms, quiet_ms, max_crashes, crash exc_string, limit.
-- Nothing expires for one lease length after the broker restarted or after nobody reaped for `quiet_ms`: then the silence
-- may have been ours, not the worker's. A clock that was set back must not make that, or a lease, any longer: what was
-- written by the clock as it was ends in the far future by the clock as it is.
-- Returns {'grace', ms left} | {'reaped', id, what, …} with what = requeued | crashed | failed | canceled | broken
-- (a key of it is of another kind: it is tried again after a lease, and does not stop the others).
local janitor, lease_ms, quiet_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local max_crashes, crash_exc = tonumber(ARGV[4]), ARGV[5]
-- Asked here and not before: between two commands the broker may be another one.
local run_id = string.match(call('INFO', 'server'), 'run_id:(%w+)')
local now, key = now_ms(), P .. 'reaper'
local seen = call('HMGET', key, 'run_id', 'at_ms', 'grace_ms')
local at, grace = tonumber(seen[2]) or 0, math.min(tonumber(seen[3]) or 0, now + lease_ms)
if seen[1] ~= run_id or now - at > quiet_ms then grace = now + lease_ms end
call('HSET', key, 'run_id', run_id, 'at_ms', int(now), 'grace_ms', int(grace), 'janitor', janitor)
call('EXPIRE', key, 3600)
if now < at then
  -- Ten: workers may have longer leases than the janitor. A live one renews, and has its own again.
  local latest = int(now + 10 * lease_ms)
  for _, id in ipairs(call('ZRANGEBYSCORE', LEASES, '(' .. latest, '+inf')) do call('ZADD', LEASES, latest, id) end
end
if now < grace then return { 'grace', int(grace - now) } end

local function give_back(rec)
  local id, what = rec.id, 'requeued'
  if rec.stage == 'device' then
    what = 'crashed'
    local crashes = tonumber(rec.crashes) or 0
    if rec.crashed_execution ~= rec.execution then -- else it was counted by a look that then came upon a broken key
      call('RPUSH', P .. 'attempts:' .. id, cjson.encode({ code = 'worker_crashed', worker = rec.worker,
        attempt = tonumber(rec.attempts), at_ms = now,
        message = 'the worker fell silent while this job was on its device' }))
      call('HSET', P .. 'job:' .. id, 'crashed_execution', rec.execution)
      crashes = call('HINCRBY', P .. 'job:' .. id, 'crashes', 1)
    end
    if crashes >= max_crashes then
      finish(rec, 'failed', now, 'exc_string', crash_exc)
      return 'failed'
    end
  end
  return requeue(rec, 'LPUSH', now, rec.execution) == 'canceled' and 'canceled' or what
end

local out = { 'reaped' }
local due = call('ZRANGEBYSCORE', LEASES, '-inf', int(now), 'LIMIT', 0, tonumber(ARGV[6]))
for i = #due, 1, -1 do -- the last one first: each goes before the others
  local id = due[i]
  local rec = record(id)
  if not rec or rec.state ~= 'processing' then
    call('ZREM', LEASES, id)
  else
    local fine, what = pcall(give_back, rec)
    if not fine then
      call('ZADD', LEASES, int(now + lease_ms), id)
      what = 'broken'
    end
    out[#out + 1] = id
    out[#out + 1] = what
  end
end
return out
