-- Would `submit` accept this job? Asked before many bytes are sent. Changes nothing.
-- ARGV: id, payload_hash, limits (JSON), latents_bytes, reserved_bytes, bytes that will lie in the broker.
-- Returns {'yes'} | {'exists'} | {'conflict'} | {'full', reason}
local known = call('HGET', P .. 'job:' .. ARGV[1], 'hash')
if known then return { known == ARGV[2] and 'exists' or 'conflict' } end
if call('EXISTS', RQ .. 'job:' .. ARGV[1]) == 1 then return { 'conflict' } end
local reason = refusal(cjson.decode(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]))
if reason then return { 'full', reason } end
return { 'yes' }
