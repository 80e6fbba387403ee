-- Ends queued jobs whose start deadline passed, wherever in their queue they are. ARGV: exc_string, limit, places.
-- Returns their ids. Taking a job out of the middle of a queue walks there: after `places` of them the rest waits for the
-- next call, so that a long queue does not hold the broker. One that was started once has no start deadline any more.
local now, out, places = now_ms(), {}, tonumber(ARGV[3])
for _, id in ipairs(call('ZRANGEBYSCORE', DEADLINES, '-inf', int(now - 1), 'LIMIT', 0, tonumber(ARGV[2]))) do
  if places <= 0 then break end
  call('ZREM', DEADLINES, id) -- first: a broken record must not stand before the others again and again
  local rec = record(id)
  if rec and rec.state == 'queued' and is_late(rec, now) then
    local queue = RQ .. 'queue:' .. rec.rq_queue
    places = places - 2 * (call('LPOS', queue, id) or call('LLEN', queue)) - 1
    fail_late(rec, now, ARGV[1])
    out[#out + 1] = id
  end
end
return out
