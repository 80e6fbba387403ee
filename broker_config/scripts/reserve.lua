-- Enters a blob that is about to be written outside Redis. ARGV: store, name, ms at which it lapses.
-- Returns 'reserved' | 'unknown' (not the broker's store) | 'late'. Refusing what has lapsed makes a repetition
-- harmless that arrives when the name was doomed already: a name is never entered twice.
local store, name, lapse = ARGV[1], ARGV[2], tonumber(ARGV[3])
if string.sub(call('HGET', P .. 'stores', store) or '', 1, 6) ~= 'ready ' then return 'unknown' end
if lapse <= now_ms() then return 'late' end
call('ZADD', P .. 'external:' .. store, int(lapse), name)
return 'reserved'
