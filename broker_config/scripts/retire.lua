-- Ends retention: the job becomes a tombstone and its blobs lose this owner.
-- ARGV: limit, then ids to retire early (`ack`); without ids, whatever is due.
-- Returns how many became tombstones. Blobs outside Redis that lost their last owner are due (scripts/doom.lua).

-- What is left of a record: what snapshots and lists say, the fence and the hash that replays are held to, and what the
-- doctor's walk counts. It is written anew, since a hash that once held a message stays a hash table, of 1.4 to 1.9 kB; as
-- a list pack, which values of at most 64 bytes let it be, it takes a third of that, for a week.
local KEPT = { 'hash', 'vae', 'rq_queue', 'execution', 'failed_execution', 'worker', 'latents_bytes',
  'reserved_bytes', 'submitted_ms', 'started_ms', 'ended_ms', 'expires_ms', 'attempts', 'errors', 'crashes', 'done',
  'total' }
local function entomb(rec, early)
  local job, left = P .. 'job:' .. rec.id, call('PTTL', P .. 'job:' .. rec.id)
  local fields = { 'state', 'expired', 'outcome', rec.state }
  for _, name in ipairs(KEPT) do
    if rec[name] and rec[name] ~= '' then
      fields[#fields + 1] = name
      fields[#fields + 1] = rec[name]
    end
  end
  call('DEL', job)
  call('HSET', job, unpack(fields))
  call('PEXPIRE', job, (early or left < 0) and rec.tombstone_ms or left)
end

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
      entomb(rec, early)
      if early then call('PEXPIRE', P .. 'attempts:' .. id, rec.tombstone_ms) end
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
