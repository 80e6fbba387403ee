-- A worker that knows a newer schema takes parked jobs back into their queues. ARGV: schema_version, limit.
local now, count = now_ms(), 0
local parked = call('ZRANGEBYSCORE', P .. 'parked', '-inf', ARGV[1], 'LIMIT', 0, tonumber(ARGV[2]))
for i = #parked, 1, -1 do -- the last one first: each goes before the others
  local id = parked[i]
  call('ZREM', P .. 'parked', id)
  local rec = record(id)
  if rec and rec.state == 'queued' then
    requeue(rec, 'LPUSH', now, '')
    count = count + 1
  end
end
return count
