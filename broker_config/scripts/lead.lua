-- One janitor leads; the others stand by. ARGV: janitor, ttl_ms (0: steps down). Returns 1 if it leads now.
local key, leader = P .. 'janitor', call('GET', P .. 'janitor')
if leader and leader ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then
  call('DEL', key)
  return 0
end
call('SET', key, ARGV[1], 'PX', ARGV[2])
return 1
