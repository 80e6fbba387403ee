-- What became of an attempt to deliver. ARGV: id, token, word ('delivered', 'failed', 'stopped': the endpoint is gone for
-- good), attempt (JSON), pause until the next one in ms ('': there is none),
-- whether the receiver answered at all ('1', '0'; '': it was not asked), time until the dead letters' end (ms), most
-- dead letters, ms by which the clock is ahead (tests).
-- Returns 'delivered' | 'again' | 'dead' | 'dropped' | 'already' (a replay) | 'lost' (the lease ended, and another
-- courier has it) | 'unknown'.
local id, token, word, attempt, pause, answered = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local dead_ms, most_dead = tonumber(ARGV[7]), tonumber(ARGV[8])
local now = now_ms() + tonumber(ARGV[9])
local key = P .. 'delivery:' .. id
local known = call('HMGET', key, 'token', 'settled', 'receiver', 'log', 'endpoint', 'sure', 'at_ms')
local receiver = known[3]
if not receiver then return 'unknown' end
if known[2] == token then return 'already' end
if known[1] ~= token then return 'lost' end

local log = known[4] and cjson.decode(known[4]) or {}
log[#log + 1] = cjson.decode(attempt)
while #log > 50 do table.remove(log, 1) end
call('HSET', key, 'log', cjson.encode(log), 'settled', token, 'token', '')
call('HINCRBY', key, 'tries', 1)
call('ZREM', P .. 'sending:' .. receiver, id)
call('HINCRBY', COUNTS, word == 'delivered' and 'attempts_good' or 'attempts_bad', 1)

-- The receiver's circuit breaker: five silences in a row, and it is left alone for 10 s, then twice as long each time,
-- up to 5 minutes. An answer, whatever it says, closes it.
local breaker = P .. 'breaker:' .. receiver
if answered == '1' then
  call('DEL', breaker)
elseif answered == '0' and (tonumber(call('HGET', breaker, 'open_ms')) or 0) <= now then
  local failures = call('HINCRBY', breaker, 'failures', 1)
  if failures >= 5 then
    call('HSET', breaker, 'open_ms', int(now + math.min(300000, 10000 * 2 ^ math.min(failures - 5, 10))))
  end
  call('EXPIRE', breaker, 86400)
end
call('ZADD', RECEIVERS, 'LT', int(now), receiver) -- there is room for another

if word == 'delivered' then
  leave_outbox(id, receiver)
  call('HSET', key, 'state', 'delivered', 'ended_ms', int(now))
  call('PEXPIRE', key, 3600000)
  call('HINCRBY', COUNTS, 'delivered', 1)
  return 'delivered'
end
if word == 'stopped' then
  call('ZADD', STOPPED, int(now), known[5])
  call('ZREMRANGEBYRANK', STOPPED, 0, -10001)
end
local ends = tonumber(call('ZSCORE', OUTBOX, id)) or 0
if word == 'failed' and pause ~= '' and now + tonumber(pause) <= ends then
  call('HSET', key, 'state', 'pending', 'due_ms', int(now + tonumber(pause)))
  put_due(id, receiver, now + tonumber(pause))
  return 'again'
end
bury(id, word == 'stopped' and 'the endpoint answered 410' or 'every attempt failed', now, dead_ms, most_dead)
return known[6] == '1' and 'dead' or 'dropped'
