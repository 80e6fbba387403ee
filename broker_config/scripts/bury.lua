-- Gives up deliveries whose time is over, tried or not. ARGV: time until the dead letters' end (ms), most dead letters,
-- limit, ms by which the clock is ahead (tests). Returns their ids.
local now = now_ms() + tonumber(ARGV[4])
local over = call('ZRANGEBYSCORE', OUTBOX, '-inf', int(now), 'LIMIT', 0, tonumber(ARGV[3]))
for _, id in ipairs(over) do
  local tried = tonumber(call('HGET', P .. 'delivery:' .. id, 'tries')) or 0
  bury(id, tried > 0 and 'its time is over' or 'no courier came by in time', now, tonumber(ARGV[1]), tonumber(ARGV[2]))
end
call('ZREMRANGEBYSCORE', DEAD, '-inf', int(now))
return over
