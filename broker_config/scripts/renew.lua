-- Renews leases. ARGV: worker, lease_ms, then for each job: id, execution, stage, done, total, whether it is to be
-- extended ('1'; otherwise a lease with half of its time left is not: only the stage is told).
-- Returns one word for each job: 'renewed' | 'adopted' | 'cancel' | 'lost'.
-- 'adopted': the lease had ended and the job was queued again, but nobody claimed it: the attempt goes on.
-- An attempt never goes back a stage. Two threads of a worker renew, and a word may be late on its way: the older one
-- must not hide that the job is on the device, where a death counts.
local ORDER = { claimed = 1, ready = 2, device = 3, encode = 4, finish = 5 }
local worker, lease_ms, now, out = ARGV[1], tonumber(ARGV[2]), now_ms(), {}
local at = string.format('%.3f', now / 1000)
for i = 3, #ARGV, 6 do
  local id, execution, stage, done, total = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  local extend = ARGV[i + 5] == '1'
  local rec = record(id)
  if fence(rec, execution) ~= 'mine' then
    out[#out + 1] = 'lost'
  else
    local word, status = 'renewed', rq_status(id)
    if rec.state == 'queued' then
      word = 'adopted'
      call('LREM', RQ .. 'queue:' .. rec.rq_queue, 1, id)
      revive(rec)
      call('HSET', P .. 'job:' .. id, 'state', 'processing')
      if status ~= 'canceled' then rq_set(id, 'status', 'started') end
    end
    if rec.cancel == '1' or status == 'canceled' then word = 'cancel' end
    if rec.state == 'processing' and (ORDER[stage] or 0) < (ORDER[rec.stage] or 0) then
      stage, done, total = rec.stage, rec.done or '0', rec.total or '0'
    end
    call('HSET', P .. 'job:' .. id, 'stage', stage, 'done', done, 'total', total)
    if rec.webhook and done ~= '0' and done ~= rec.done and now - (tonumber(rec.told_ms) or 0) >= 500 then
      call('HSET', P .. 'job:' .. id, 'told_ms', int(now))
      announce(rec, 'progress', now, done, total)
    end
    if extend or word == 'adopted' or (tonumber(call('ZSCORE', LEASES, id)) or 0) < now + lease_ms / 2 then
      call('ZADD', LEASES, int(now + lease_ms), id)
      rq_set(id, 'last_heartbeat', utc(now))
      call('ZADD', RQ .. 'wip:' .. rec.rq_queue, '+inf', id .. ':' .. execution)
      call('HSET', RQ .. 'execution:' .. id .. ':' .. execution, 'id', execution, 'job_id', id, 'created_at',
        string.format('%.3f', tonumber(rec.started_ms) / 1000), 'last_heartbeat', at, 'worker_name', worker)
      call('PEXPIRE', RQ .. 'execution:' .. id .. ':' .. execution, int(lease_ms * 4))
      call('ZADD', RQ .. 'executions:' .. id, '+inf', execution)
      call('PEXPIRE', RQ .. 'executions:' .. id, int(lease_ms * 4))
      call('SADD', RQ .. 'worker:' .. worker .. ':executions', id .. ':' .. execution)
      call('PEXPIRE', RQ .. 'worker:' .. worker .. ':executions', int(lease_ms * 4))
    end
    out[#out + 1] = word
  end
end
return out
