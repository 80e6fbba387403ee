-- Records an error of this attempt. ARGV: id, execution, error (JSON), retryable, rq exc_string, max_errors,
-- elsewhere ('1': better tried by another worker, if one serves the VAE).
-- Returns 'retrying' | 'failed' | 'canceled' (someone asked for that meanwhile) | 'already' | 'lost'.
local id, execution = ARGV[1], ARGV[2]
local rec = record(id)
if rec and rec.failed_execution == execution then return 'already' end
local word = fence(rec, execution)
if word ~= 'mine' then return 'lost' end
local now = now_ms()
revive(rec)
call('RPUSH', P .. 'attempts:' .. id, ARGV[3])
local errors = call('HINCRBY', P .. 'job:' .. id, 'errors', 1)
call('HSET', P .. 'job:' .. id, 'failed_execution', execution)
if ARGV[4] == '1' and errors < tonumber(ARGV[6]) then
  call('HSET', P .. 'job:' .. id, 'avoid', ARGV[7] == '1' and rec.worker or '')
  if rec.state == 'queued' then call('LREM', RQ .. 'queue:' .. rec.rq_queue, 1, id) end
  return requeue(rec, 'RPUSH', now, '') == 'canceled' and 'canceled' or 'retrying'
end
finish(rec, 'failed', now, 'exc_string', ARGV[5])
return 'failed'
