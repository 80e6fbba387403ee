-- Hands claimed jobs back, unmarked (stopping, or a prefetched batch that will not run). The next worker takes
-- them first. ARGV: for each job id, execution. Returns how many went back.
-- One whose decode began was started in time, and may go on as often as it needs; one that was only fetched was not.
local DECODED = { device = true, encode = true, finish = true }
local count, now = 0, now_ms()
for i = #ARGV - 1, 1, -2 do
  local rec = record(ARGV[i])
  if fence(rec, ARGV[i + 1]) == 'mine' and rec.state == 'processing' then
    call('HINCRBY', P .. 'job:' .. rec.id, 'attempts', -1)
    if DECODED[rec.stage] then call('HDEL', P .. 'job:' .. rec.id, 'deadline_ms') end
    if requeue(rec, 'LPUSH', now, '') == 'queued' then
      count = count + 1
      -- It may have passed while the job was held: then nobody looks for it any more.
      if rec.deadline_ms and not DECODED[rec.stage] then call('ZADD', DEADLINES, rec.deadline_ms, rec.id) end
    end
  end
end
return count
