-- A delivery starts over, at once, under its id. ARGV: id, how long it is tried (ms), time until the dead letters' end
-- (ms), most in the outbox, ms by which the clock is ahead (tests).
-- Returns 'queued' | 'pending' (it has not ended) | 'full' | 'unknown'.
local id, lives_ms, dead_ms, most = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local now = now_ms() + tonumber(ARGV[5])
local key = P .. 'delivery:' .. id
local known = call('HMGET', key, 'state', 'receiver', 'signer')
if not known[1] then return 'unknown' end
if known[1] == 'pending' or known[1] == 'sending' then return 'pending' end
if call('ZCARD', OUTBOX) >= most then return 'full' end
call('ZREM', DEAD, id)
call('HSET', key, 'state', 'pending', 'tries', '0', 'due_ms', int(now), 'ended_ms', '0', 'reason', '')
call('PEXPIRE', key, int(lives_ms + dead_ms))
if string.sub(known[3], 1, 4) == 'job:' then
  call('PEXPIRE', P .. 'webhook-secret:' .. known[3], int(lives_ms + dead_ms), 'GT')
end
call('DEL', P .. 'breaker:' .. known[2])
call('ZADD', OUTBOX, int(now + lives_ms), id)
put_due(id, known[2], now)
ring_couriers()
return 'queued'
