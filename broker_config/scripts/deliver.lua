-- A courier takes deliveries that are due. ARGV: token, courier, lease_ms, most, most for one receiver, courier's
-- time to live (ms), time until the dead letters' end (ms), most dead letters, ms by which the clock is ahead (tests).
-- The token makes it safe to send again: the same token gets the same answer, and the one before it, which can only be
-- a copy that was late on its way, gets nothing.
-- Returns {now, {id, {field, value, …}}, …}
local token, courier, lease_ms, most, each = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local dead_ms, most_dead = tonumber(ARGV[7]), tonumber(ARGV[8])
local now = now_ms() + tonumber(ARGV[9])
local memo = P .. 'courier:' .. courier

local function answer(ids)
  local out = { int(now) }
  for _, id in ipairs(ids) do
    if call('HGET', P .. 'delivery:' .. id, 'token') == token then
      out[#out + 1] = { id, call('HGETALL', P .. 'delivery:' .. id) }
    end
  end
  return out
end

call('ZADD', P .. 'couriers', int(now_ms() + tonumber(ARGV[6])), courier)
call('ZREMRANGEBYSCORE', P .. 'couriers', '-inf', int(now_ms()))
call('EXPIRE', P .. 'couriers', 3600)
local last = call('HMGET', memo, 'token', 'ids', 'before')
if last[1] == token then return answer(cjson.decode(last[2])) end
if last[3] == token then return { int(now) } end

-- How many may be under way to a receiver. One that does not answer must not hold what others could use: from its
-- first silence on it gets two, from the fifth in a row on one, after a pause (settle.lua).
local function room_of(receiver)
  local breaker = call('HMGET', P .. 'breaker:' .. receiver, 'failures', 'open_ms')
  local failures, open_ms = tonumber(breaker[1]) or 0, tonumber(breaker[2]) or 0
  if open_ms > now then return 0, open_ms end
  return math.min(each, failures >= 5 and 1 or failures > 0 and 2 or each), 0
end

-- Leases that ended: their courier died, or was cut off.
local function take_back(receiver)
  for _, id in ipairs(call('ZRANGEBYSCORE', P .. 'sending:' .. receiver, '-inf', int(now))) do
    call('ZREM', P .. 'sending:' .. receiver, id)
    if call('EXISTS', P .. 'delivery:' .. id) == 1 then
      call('HSET', P .. 'delivery:' .. id, 'state', 'pending', 'token', '', 'due_ms', int(now))
      call('ZADD', P .. 'due:' .. receiver, int(now), id)
    end
  end
end

local taken, looks = {}, 500
local function take(receiver, room)
  while room > 0 and #taken < most and looks > 0 do
    looks = looks - 1
    local id = call('ZRANGEBYSCORE', P .. 'due:' .. receiver, '-inf', int(now), 'LIMIT', 0, 1)[1]
    if not id then return end
    call('ZREM', P .. 'due:' .. receiver, id)
    local endpoint = call('HGET', P .. 'delivery:' .. id, 'endpoint')
    if not endpoint then
      call('ZREM', OUTBOX, id)
    elseif call('ZSCORE', STOPPED, endpoint) and call('HGET', P .. 'delivery:' .. id, 'event') ~= 'ping' then
      bury(id, 'the endpoint has answered 410: latentq webhooks enable', now, dead_ms, most_dead)
    else
      call('HSET', P .. 'delivery:' .. id, 'state', 'sending', 'token', token, 'courier', courier)
      call('ZADD', P .. 'sending:' .. receiver, int(now + lease_ms), id)
      taken[#taken + 1] = id
      room = room - 1
    end
  end
end

-- When the receiver is worth another look: something is due and may go, or a lease ends.
local function look_again(receiver, room, open_ms)
  local due = call('ZRANGE', P .. 'due:' .. receiver, 0, 0, 'WITHSCORES')[2]
  local lease = call('ZRANGE', P .. 'sending:' .. receiver, 0, 0, 'WITHSCORES')[2]
  local free = room - call('ZCARD', P .. 'sending:' .. receiver) > 0
  local at = lease and tonumber(lease)
  if due and (free or open_ms > 0) then at = math.min(at or math.huge, math.max(tonumber(due), open_ms)) end
  if at then call('ZADD', RECEIVERS, int(at), receiver) else call('ZREM', RECEIVERS, receiver) end
end

for _, receiver in ipairs(call('ZRANGEBYSCORE', RECEIVERS, '-inf', int(now), 'LIMIT', 0, 128)) do
  take_back(receiver)
  local room, open_ms = room_of(receiver)
  take(receiver, room - call('ZCARD', P .. 'sending:' .. receiver))
  look_again(receiver, room, open_ms)
  if #taken >= most or looks == 0 then break end
end
call('HSET', memo, 'token', token, 'ids', #taken == 0 and '[]' or cjson.encode(taken), 'before', last[1] or '')
call('EXPIRE', memo, 3600)
return answer(taken)
