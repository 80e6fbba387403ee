-- Puts a job on its key's list and counts it among the key's jobs of the day, before it is submitted: an entry without a
-- job is passed over, a job without an entry would be on no list. One that is there already is not counted again.
-- Once more when it was accepted, and then nothing is refused: another submit under the same id, refused meanwhile, may
-- have taken back (`withdraw`) what this one had entered.
-- ARGV: key id, job id, jobs a day (0: any), ms that the list is kept, '1': it was accepted.
-- Returns {'ok'} | {'quota', µs to wait}
local id, job, per_day, kept, accepted = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5] == '1'
if not may_enter(id, job, per_day) then return { 'quota', int(until_tomorrow()) } end
local known = call('EXISTS', P .. 'job:' .. job) == 1
-- Entered before midnight and accepted after it, it is a job of the day before.
local counts = not known or accepted and call('SISMEMBER', quota_of(id, 1), job) == 0
if per_day > 0 and counts then
  call('SADD', quota_of(id), job)
  call('EXPIRE', quota_of(id), 172800)
end
local list, now = P .. 'index:' .. id, now_ms()
if known then call('ZADD', list, 'NX', int(now), job) else call('ZADD', list, int(now), job) end
call('ZREMRANGEBYSCORE', list, '-inf', int(now - kept))
call('PEXPIRE', list, int(kept))
return { 'ok' }
