-- Looks after jobs that may have fallen between the lists: someone used RQ's own tools, or a key was deleted.
-- ARGV: settle_ms, then ids. A job younger than settle_ms in its state is left alone. Returns {id, what, …}:
--   requeued  queued, but in no list             leased    processing, but without lease (it ends at once)
--   canceled  canceled or deleted with RQ's tools while it waited
--   mended    ended, but RQ's status says otherwise
local now, out = now_ms(), {}
for i = 2, #ARGV do
  local rec, id, what = record(ARGV[i]), ARGV[i], nil
  local status = call('HGET', RQ .. 'job:' .. id, 'status')
  local since = rec and (rec.state == 'queued' and rec.queued_ms or rec.ended_ms or rec.started_ms) or now
  if rec and now - tonumber(since) > tonumber(ARGV[1]) then
    if rec.state == 'queued' then
      if not status or status == 'canceled' or status == 'stopped' then
        finish(rec, 'canceled', now)
        what = 'canceled'
      elseif not call('LPOS', RQ .. 'queue:' .. rec.rq_queue, id) and not call('ZSCORE', P .. 'parked', id) then
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
  if what then
    out[#out + 1] = id
    out[#out + 1] = what
  end
end
return out
