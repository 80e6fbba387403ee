-- Counts the jobs that have not ended anew, and sets right what admission counts: someone deleted keys. ARGV: most.
-- A job that has not ended is in a queue, parked or leased, so this is exact, but for one that the audit is about to put
-- back. More than `most` are not counted: nobody else is served meanwhile.
-- Returns {name, counted so far, counted now, …} of what was wrong.
local most, live, out = tonumber(ARGV[1]), {}, {}
local lists = {}
for _, key in ipairs(call('SMEMBERS', RQ .. 'queues')) do
  if string.sub(key, 1, #RQ + 14) == RQ .. 'queue:latentq.' then lists[#lists + 1] = key end
end
local count = call('ZCARD', LEASES) + call('ZCARD', P .. 'parked')
for _, key in ipairs(lists) do count = count + call('LLEN', key) end
if count > most then return out end

for _, id in ipairs(call('ZRANGE', LEASES, 0, -1)) do live[id] = true end
for _, id in ipairs(call('ZRANGE', P .. 'parked', 0, -1)) do live[id] = true end
for _, key in ipairs(lists) do
  for _, id in ipairs(call('LRANGE', key, 0, -1)) do live[id] = true end
end
local names = { 'jobs', 'latents_bytes', 'reserved_bytes', 'px', 'webhooks' }
local truth = { jobs = 0, latents_bytes = 0, reserved_bytes = 0, px = 0, webhooks = 0 }
for id in pairs(live) do
  local rec = redis.pcall('HMGET', P .. 'job:' .. id, 'state', 'latents_bytes', 'reserved_bytes', 'px', 'webhook')
  if rec[1] == 'queued' or rec[1] == 'processing' then
    truth.jobs = truth.jobs + 1
    for i = 2, 4 do truth[names[i]] = truth[names[i]] + (tonumber(rec[i]) or 0) end
    if rec[5] and rec[5] ~= '' then truth.webhooks = truth.webhooks + 1 end
  end
end
for _, name in ipairs(names) do
  local told = tonumber(call('HGET', TOTALS, name)) or 0
  if told ~= truth[name] then
    call('HSET', TOTALS, name, int(truth[name]))
    for _, item in ipairs({ name, int(told), int(truth[name]) }) do out[#out + 1] = item end
  end
end
return out
