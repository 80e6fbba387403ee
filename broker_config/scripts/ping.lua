-- Enters a delivery that belongs to no job. ARGV: id, receiver, url, endpoint, signer, how long it is tried (ms), how long
-- it is remembered (ms). Safe to repeat. Returns 1.
if call('EXISTS', P .. 'delivery:' .. ARGV[1]) == 1 then return 1 end
enter(ARGV[1], ARGV[2], now_ms(), tonumber(ARGV[6]), tonumber(ARGV[7]),
  { 'job', '', 'event', 'ping', 'url', ARGV[3], 'endpoint', ARGV[4], 'signer', ARGV[5], 'inline', '0', 'sure', '0',
    'done', '0', 'total', '0' })
call('DEL', P .. 'breaker:' .. ARGV[2])
return 1
