-- Hands claimed jobs back, unmarked (stopping, or a prefetched batch that will not run). The next worker takes
-- them first. ARGV: for each job id, execution. Returns how many went back.
local count, now = 0, now_ms()
for i = #ARGV - 1, 1, -2 do
  local rec = record(ARGV[i])
  if fence(rec, ARGV[i + 1]) == 'mine' and rec.state == 'processing' then
    call('HINCRBY', P .. 'job:' .. rec.id, 'attempts', -1)
    if requeue(rec, 'LPUSH', now, '') == 'queued' then count = count + 1 end
  end
end
return count
