-- Shows the broker a store of blobs outside Redis. ARGV: URL, id found there ('': none), id to give it.
-- Returns {word, id, URL}:
--   ours     it is the broker's store
--   create   the broker has no store yet and none was found: make one with this id, then ask again
--   other    the broker has another store: this one
--   foreign  the broker has no store, and did not give out the id that was found
local key, url, found, fresh = P .. 'stores', ARGV[1], ARGV[2], ARGV[3]
local flat, ready, where = call('HGETALL', key), nil, ''
for i = 1, #flat, 2 do
  if string.sub(flat[i + 1], 1, 6) == 'ready ' then ready, where = flat[i], string.sub(flat[i + 1], 7) end
end
if ready and ready ~= found then return { 'other', ready, where } end
if ready then return { 'ours', ready, where } end
if found == '' then
  call('HSET', key, fresh, 'new ' .. url)
  return { 'create', fresh, url }
end
if call('HEXISTS', key, found) == 0 then return { 'foreign', found, url } end
call('DEL', key) -- ids that others were given at the same moment
call('HSET', key, found, 'ready ' .. url)
return { 'ours', found, url }
