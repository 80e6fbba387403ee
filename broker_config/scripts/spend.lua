-- Lets a gateway's key submit, or says when. ARGV: key id, µs between two submits at its rate, submits at once, submits
-- now, submits a day (0: any).
-- Returns {'ok'} | {'rate', µs to wait} | {'quota', µs to wait}.
-- The rate is a leaky bucket that stores one time (GCRA): "when everything let in so far will have flowed out".
local id, interval, burst, cost, per_day = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local time = call('TIME')
local now = time[1] * 1000000 + time[2]
local day = math.floor(time[1] / 86400)
local rate, quota = P .. 'rate:' .. id, P .. 'quota:' .. id .. ':' .. int(day)

local used = tonumber(call('GET', quota)) or 0
if per_day > 0 and used + cost > per_day then return { 'quota', int((day + 1) * 86400 * 1000000 - now) } end
local empty = math.max(tonumber(call('GET', rate)) or 0, now) + interval * cost
local wait = empty - now - interval * math.max(burst, cost)
if wait > 0 then return { 'rate', int(wait) } end
call('SET', rate, int(empty), 'PX', int(math.max(1, math.ceil((empty - now) / 1000))))
call('INCRBY', quota, cost)
call('EXPIRE', quota, 172800)
return { 'ok' }
