-- Decides which blobs outside Redis go. ARGV: store, settle_ms, limit.
-- Dooms what is past its time; returns names that were doomed settle_ms ago. A doomed blob is nobody's: `own` and
-- `submit` look in `external` only. It leaves the list when it is deleted.
local external, doomed = P .. 'external:' .. ARGV[1], P .. 'doomed:' .. ARGV[1]
local now, limit = now_ms(), tonumber(ARGV[3])
for _, name in ipairs(call('ZRANGEBYSCORE', external, '-inf', int(now), 'LIMIT', 0, limit)) do
  call('ZREM', external, name)
  call('ZADD', doomed, 'NX', int(now), name)
end
return call('ZRANGEBYSCORE', doomed, '-inf', int(now - tonumber(ARGV[2])), 'LIMIT', 0, limit)
