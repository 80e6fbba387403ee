-- Accepts a job, once. ARGV: id, payload_hash, limits (JSON), blob (see prelude, `outside`), the blob's bytes
--   ('': it was stored before), secrets of its webhook (JSON; '': none of its own), #record fields, record field/value …,
--   RQ hash field/value …
-- Returns {'accepted'|'exists', state} | {'conflict'} | {'blob_missing'} | {'secret_missing'} | {'full', reason}
local id, hash, limits = ARGV[1], ARGV[2], cjson.decode(ARGV[3])
local blob, bytes, secrets, fields = ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[7])
local job, rq_job = P .. 'job:' .. id, RQ .. 'job:' .. id

local known = call('HMGET', job, 'hash', 'state')
if known[1] then
  settle(blob) -- a replay has just stored it again, for a job that may no longer need it
  if known[1] == hash then return { 'exists', known[2] } end
  return { 'conflict' }
end
if call('EXISTS', rq_job) == 1 then return { 'conflict' } end

local rec = { id = id }
for i = 8, 7 + fields, 2 do rec[ARGV[i]] = ARGV[i + 1] end
local hook = rec.webhook and cjson.decode(rec.webhook)
if hook and secrets == '' and call('EXISTS', P .. 'webhook-secret:' .. hook.signer) == 0 then return { 'secret_missing' } end
local reason = refusal(limits, tonumber(rec.latents_bytes), tonumber(rec.reserved_bytes), #bytes)
if reason then
  -- What is refused must not fill a broker that is full; a caller who keeps trying finds the blob still there.
  -- Outside Redis it fills nothing here, and a name must not lapse before the time it was reserved until.
  if not outside(blob) and call('ZCARD', P .. 'owners:' .. blob) == 0 then
    call('PEXPIRE', P .. 'blob:' .. blob, limits.refused_ms)
  end
  return { 'full', reason }
end
store_inline(blob, bytes)
if not is_stored(blob) then return { 'blob_missing' } end

local now = int(now_ms())
local values = { 'state', 'queued', 'hash', hash, 'submitted_ms', now, 'queued_ms', now }
for i = 8, 7 + fields do values[#values + 1] = ARGV[i] end
call('HSET', job, unpack(values))
local rq_values = {}
for i = 8 + fields, #ARGV do rq_values[#rq_values + 1] = ARGV[i] end
call('HSET', rq_job, unpack(rq_values))
call('ZADD', SUBMITTED, now, id)
call('SADD', RQ .. 'queues', RQ .. 'queue:' .. rec.rq_queue)
call('RPUSH', RQ .. 'queue:' .. rec.rq_queue, id)
if rec.deadline_ms then call('ZADD', DEADLINES, rec.deadline_ms, id) end
own(blob, id, 'inf')
call('HINCRBY', TOTALS, 'jobs', 1)
call('HINCRBY', TOTALS, 'latents_bytes', rec.latents_bytes)
call('HINCRBY', TOTALS, 'reserved_bytes', rec.reserved_bytes)
call('HINCRBY', TOTALS, 'px', rec.px)
if hook then
  call('HINCRBY', TOTALS, 'webhooks', 1)
  if secrets ~= '' then
    for number, secret in ipairs(cjson.decode(secrets)) do -- a TTL comes with the job's end (outbox.lua)
      call('HSET', P .. 'webhook-secret:' .. hook.signer, number, secret)
    end
  else
    call('PEXPIRE', P .. 'webhook-secret:' .. hook.signer, int(hook.secret_ms), 'GT')
  end
  announce(rec, 'queued', now_ms())
end
ring(rec.vae)
return { 'accepted', 'queued' }
