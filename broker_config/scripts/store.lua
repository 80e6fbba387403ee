-- Stores an artifact's bytes for a provisional lifetime, also past maxmemory: admission has reserved their room.
-- ARGV: blob, bytes, provisional_ms. Safe to repeat: an owned blob keeps its lifetime (`GT`: no TTL counts as forever).
local key = P .. 'blob:' .. ARGV[1]
call('SET', key, ARGV[2], 'PX', ARGV[3], 'NX')
call('PEXPIRE', key, ARGV[3], 'GT')
return 1
