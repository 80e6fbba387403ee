-- A worker says that it lives and what it serves. ARGV: worker, ttl_ms (0: it leaves), report (JSON), #VAEs, VAE …, then
-- VAEs that it does not serve for now.
local worker, ttl, now = ARGV[1], tonumber(ARGV[2]), now_ms()
for i = 5, #ARGV do
  local key = P .. 'serving:' .. ARGV[i]
  if ttl > 0 and i < 5 + tonumber(ARGV[4]) then
    call('ZADD', key, int(now + ttl), worker)
    call('ZREMRANGEBYSCORE', key, '-inf', int(now))
    call('EXPIRE', key, 3600)
  else
    call('ZREM', key, worker)
  end
end
if ttl > 0 then
  call('HSET', P .. 'worker:' .. worker, 'report', ARGV[3], 'seen_ms', int(now))
  call('PEXPIRE', P .. 'worker:' .. worker, int(ttl))
else
  call('DEL', P .. 'worker:' .. worker)
end
return 1
