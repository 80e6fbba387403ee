-- ARGV: id, execution ('' for anyone outside the worker). Queued jobs end at once; a running one is marked and
-- its worker ends it between two stages by calling this again with its execution.
-- Returns 'canceled' | 'requested' | the terminal state it already has | 'lost' (not this execution's any more) |
-- 'unknown'. With a third argument 'queued' (purge) a job that a worker has taken by now is left alone: 'processing'.
local rec = record(ARGV[1])
if not rec then return 'unknown' end
if rec.state ~= 'queued' and rec.state ~= 'processing' then return rec.state end
if rec.state == 'processing' and ARGV[3] == 'queued' then return 'processing' end
if ARGV[2] ~= '' and rec.execution ~= ARGV[2] then return 'lost' end
if rec.state == 'queued' or ARGV[2] ~= '' then
  finish(rec, 'canceled', now_ms())
  return 'canceled'
end
call('HSET', P .. 'job:' .. rec.id, 'cancel', '1')
return 'requested'
