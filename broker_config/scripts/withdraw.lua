-- Takes a job that was refused after all off its key's list, and out of its count of the day. ARGV: key id, job id.
local id, job = ARGV[1], ARGV[2]
if call('EXISTS', P .. 'job:' .. job) == 0 then
  call('SREM', quota_of(id), job)
  call('ZREM', P .. 'index:' .. id, job)
end
