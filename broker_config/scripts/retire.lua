-- Ends retention: the job becomes a tombstone and its blobs lose this owner.
-- ARGV: limit, then ids to retire early (`ack`); without ids, whatever is due.
-- Returns how many became tombstones. Blobs outside Redis that lost their last owner are due (scripts/doom.lua).
local now, ids, count = now_ms(), {}, 0
for i = 2, #ARGV do ids[#ids + 1] = ARGV[i] end
local early = #ids > 0
if not early then ids = call('ZRANGEBYSCORE', RETENTION, '-inf', int(now), 'LIMIT', 0, tonumber(ARGV[1])) end

for _, id in ipairs(ids) do
  local rec = record(id)
  if rec and rec.state ~= 'queued' and rec.state ~= 'processing' then
    call('ZREM', RETENTION, id)
    call('ZREM', SUBMITTED, id)
    if rec.state ~= 'expired' then
      own(rec.blob, id, nil)
      if rec.result then
        for _, artifact in ipairs(cjson.decode(rec.result).artifacts) do
          local blob = artifact.blob
          own(blob.store == 'redis' and blob.name or blob.store .. '/' .. blob.name, id, nil)
        end
      end
      local job = P .. 'job:' .. id
      call('HSET', job, 'state', 'expired', 'outcome', rec.state)
      call('HDEL', job, 'message', 'result', 'bucket', 'stage', 'webhook')
      if early then
        call('PEXPIRE', job, rec.tombstone_ms)
        call('PEXPIRE', P .. 'attempts:' .. id, rec.tombstone_ms)
      end
      unlist(rec)
      call('UNLINK', RQ .. 'job:' .. id, RQ .. 'results:' .. id)
      count = count + 1
    end
  elseif not rec then
    call('ZREM', RETENTION, id)
    call('ZREM', SUBMITTED, id)
  end
end
return count
