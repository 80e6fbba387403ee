-- Takes a job that was refused after all out of its key's count of the day. ARGV: key id, job id.
if call('EXISTS', P .. 'job:' .. ARGV[2]) == 0 then call('SREM', quota_of(ARGV[1]), ARGV[2]) end
