-- Lets a gateway's key submit, or says when. ARGV: key id, µs between two submits at its rate, submits at once, jobs a
-- day (0: any), job id, a token: the same again is the same question.
-- Returns {'ok'} | {'rate', µs to wait} | {'quota', µs to wait}.
-- The rate is a leaky bucket that stores one time (GCRA): "when everything let in so far will have flowed out". The day
-- is only looked at here, so that who has used it up is told before the latents are read; `enter` charges it.
local id, interval, burst, per_day, job = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local spent = P .. 'spent:' .. ARGV[6]
if call('EXISTS', spent) == 1 then return { 'ok' } end
if not may_enter(id, job, per_day) then return { 'quota', int(until_tomorrow()) } end
local time = call('TIME')
local now = time[1] * 1000000 + time[2]
local rate = P .. 'rate:' .. id
local empty = math.max(tonumber(call('GET', rate)) or 0, now) + interval
local wait = empty - now - interval * burst
if wait > 0 then return { 'rate', int(wait) } end
call('SET', rate, int(empty), 'PX', int(math.max(1, math.ceil((empty - now) / 1000))))
call('SET', spent, '1', 'EX', 60)
return { 'ok' }
