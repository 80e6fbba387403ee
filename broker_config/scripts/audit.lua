-- Looks after jobs that may have fallen between the lists: someone used RQ's own tools, or a key was deleted.
-- ARGV: settle_ms, then ids. A job younger than settle_ms in its state is left alone. Returns {id, what, …}:
--   requeued  queued, but in no list             leased    processing, but without lease (it ends at once)
--   canceled  canceled or deleted with RQ's tools while it waited
--   mended    ended, but RQ's status says otherwise
--   broken    a key of it is of another kind: left as it is, and does not stop the others
local now, out = now_ms(), {}

-- Whether a job is in its queue. The janitor asks of those that were not there when it last looked: they came at the
-- tail since, or went back to the head.
local function waits(rec, id)
  local key = RQ .. 'queue:' .. rec.rq_queue
  return call('LPOS', key, id, 'MAXLEN', 1000) or call('LPOS', key, id, 'RANK', -1)
end

local function look(id)
  local rec, what = record(id), nil
  if not rec and call('EXISTS', P .. 'job:' .. id) == 1 then return 'broken' end
  local status = rq_status(id)
  local since = rec and (rec.state == 'queued' and rec.queued_ms or rec.ended_ms or rec.started_ms) or now
  if rec and now - tonumber(since) > tonumber(ARGV[1]) then
    if rec.state == 'queued' then
      if not status or status == 'canceled' or status == 'stopped' then
        finish(rec, 'canceled', now)
        what = 'canceled'
      elseif not waits(rec, id) and not call('ZSCORE', P .. 'parked', id) then
        requeue(rec, 'LPUSH', now, rec.execution or '')
        what = 'requeued'
      elseif status ~= 'queued' then
        call('HSET', RQ .. 'job:' .. id, 'status', 'queued')
        what = 'mended'
      end
    elseif rec.state == 'processing' and not call('ZSCORE', LEASES, id) then
      call('ZADD', LEASES, int(now), id)
      what = 'leased'
    elseif RQ_STATUS[rec.state] and status and status ~= RQ_STATUS[rec.state] then
      call('LREM', RQ .. 'queue:' .. rec.rq_queue, 0, id)
      call('HSET', RQ .. 'job:' .. id, 'status', RQ_STATUS[rec.state])
      call('PEXPIREAT', RQ .. 'job:' .. id, rec.expires_ms)
      call('ZADD', RQ .. RQ_STATUS[rec.state] .. ':' .. rec.rq_queue, int(tonumber(rec.expires_ms) / 1000), id)
      what = 'mended'
    end
  end
  return what
end

for i = 2, #ARGV do
  local fine, what = pcall(look, ARGV[i])
  if not fine then what = 'broken' end
  if what then
    out[#out + 1] = ARGV[i]
    out[#out + 1] = what
  end
end
return out
