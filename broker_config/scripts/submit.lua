-- Accepts a job, once. ARGV: id, payload_hash, limits (JSON), blob (see prelude, `outside`),
--   #record fields, record field/value …, RQ hash field/value …
-- Returns {'accepted'|'exists', state} | {'conflict'} | {'blob_missing'} | {'full', reason}
local id, hash, limits = ARGV[1], ARGV[2], cjson.decode(ARGV[3])
local blob, fields = ARGV[4], tonumber(ARGV[5])
local job, rq_job = P .. 'job:' .. id, RQ .. 'job:' .. id

local known = call('HMGET', job, 'hash', 'state')
if known[1] then
  settle(blob) -- a replay has just stored it again, for a job that may no longer need it
  if known[1] == hash then return { 'exists', known[2] } end
  return { 'conflict' }
end
if call('EXISTS', rq_job) == 1 then return { 'conflict' } end

-- What is refused must not fill a broker that is full; a caller who keeps trying finds the blob still there.
-- Outside Redis it fills nothing here, and a name must not lapse before the time it was reserved until.
local function full(reason)
  if not outside(blob) and call('ZCARD', P .. 'owners:' .. blob) == 0 then
    call('PEXPIRE', P .. 'blob:' .. blob, limits.refused_ms)
  end
  return { 'full', reason }
end

local rec = {}
for i = 6, 5 + fields, 2 do rec[ARGV[i]] = ARGV[i + 1] end
local totals = call('HMGET', TOTALS, 'jobs', 'latents_bytes', 'reserved_bytes')
if (tonumber(totals[1]) or 0) + 1 > limits.jobs then return full('jobs') end
if (tonumber(totals[2]) or 0) + tonumber(rec.latents_bytes) > limits.latents_bytes then
  return full('latents')
end
local memory = call('INFO', 'memory')
local cap = tonumber(string.match(memory, '\nmaxmemory:(%d+)')) or 0
if cap > 0 then
  local used = tonumber(string.match(memory, 'used_memory:(%d+)'))
  local reserved = (tonumber(totals[3]) or 0) + tonumber(rec.reserved_bytes)
  if used + reserved > cap * limits.watermark then return full('memory') end
end
if not is_stored(blob) then return { 'blob_missing' } end

local now = int(now_ms())
local values = { 'state', 'queued', 'hash', hash, 'submitted_ms', now, 'queued_ms', now }
for i = 6, 5 + fields do values[#values + 1] = ARGV[i] end
call('HSET', job, unpack(values))
local rq_values = {}
for i = 6 + fields, #ARGV do rq_values[#rq_values + 1] = ARGV[i] end
call('HSET', rq_job, unpack(rq_values))
call('SADD', RQ .. 'queues', RQ .. 'queue:' .. rec.rq_queue)
call('RPUSH', RQ .. 'queue:' .. rec.rq_queue, id)
own(blob, id, 'inf')
call('HINCRBY', TOTALS, 'jobs', 1)
call('HINCRBY', TOTALS, 'latents_bytes', rec.latents_bytes)
call('HINCRBY', TOTALS, 'reserved_bytes', rec.reserved_bytes)
call('HINCRBY', TOTALS, 'px', rec.px)
ring(rec.vae)
return { 'accepted', 'queued' }
