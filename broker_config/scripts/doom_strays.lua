-- Dooms blobs outside Redis that are on no list: nobody can own them, and nothing would ever delete them.
-- ARGV: store, names that a listing of the store has shown. Returns how many were doomed.
local external, doomed, count = P .. 'external:' .. ARGV[1], P .. 'doomed:' .. ARGV[1], 0
local now = int(now_ms())
for i = 2, #ARGV do
  if not call('ZSCORE', external, ARGV[i]) then count = count + call('ZADD', doomed, 'NX', now, ARGV[i]) end
end
return count
