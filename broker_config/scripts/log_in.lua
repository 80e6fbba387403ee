-- Begins a browser's session; of each key only so many hold, and the oldest of them goes for a new one.
-- ARGV: key id, digest of the session's token, what the session is (JSON), seconds it holds, most of a key.
-- Safe to repeat. Returns 1.
local digest, lives_s = ARGV[2], tonumber(ARGV[4])
local list, now = P .. 'sessions:' .. ARGV[1], now_ms()
call('SET', P .. 'session:' .. digest, ARGV[3], 'EX', int(lives_s))
call('ZADD', list, int(now), digest)
call('ZREMRANGEBYSCORE', list, '-inf', int(now - lives_s * 1000))
while call('ZCARD', list) > tonumber(ARGV[5]) do call('DEL', P .. 'session:' .. call('ZPOPMIN', list)[1]) end
call('EXPIRE', list, int(lives_s))
return 1
