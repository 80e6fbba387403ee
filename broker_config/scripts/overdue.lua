-- Ends queued jobs whose start deadline passed, wherever in their queue they are. ARGV: exc_string, limit.
-- Returns their ids.
local now, out = now_ms(), {}
for _, id in ipairs(call('ZRANGEBYSCORE', DEADLINES, '-inf', int(now - 1), 'LIMIT', 0, tonumber(ARGV[2]))) do
  local rec = record(id)
  if rec and rec.state == 'queued' and is_late(rec, now) then
    fail_late(rec, now, ARGV[1])
    out[#out + 1] = id
  end
  call('ZREM', DEADLINES, id) -- one that was started once has no start deadline any more
end
return out
