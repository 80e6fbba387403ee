-- Puts a doomed blob that could not be deleted behind the others. ARGV: store, name, delay_ms.
return call('ZADD', P .. 'doomed:' .. ARGV[1], 'XX', int(now_ms() + tonumber(ARGV[3])), ARGV[2])
