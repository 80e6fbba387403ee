-- Stores success, once. ARGV: id, execution, result (JSON), rq return_value, artifacts (JSON; see prelude,
-- `outside`), then name and bytes of each artifact that comes along and is stored here.
-- Returns 'completed' | 'already' (this execution did it before: a replay) | 'lost' (another attempt has the
-- job, or it ended otherwise) | 'artifact_missing' (store the bytes again, then call again).
local id, execution = ARGV[1], ARGV[2]
local rec = record(id)
local word = fence(rec, execution)
if word == 'ended' and (rec.state == 'succeeded' or rec.outcome == 'succeeded') then return 'already' end
if word ~= 'mine' then return 'lost' end
local now = now_ms()
local names, along = cjson.decode(ARGV[5]), {}
for i = 6, #ARGV, 2 do along[ARGV[i]] = true end
for _, name in ipairs(names) do -- before anything is stored: without an owner it would stay for ever
  if not along[name] and not is_stored(name) then return 'artifact_missing' end
end
for i = 6, #ARGV, 2 do store_inline(ARGV[i], ARGV[i + 1]) end
for _, name in ipairs(names) do own(name, id, int(now + tonumber(rec.retention_ms))) end
revive(rec)
finish(rec, 'succeeded', now, 'return_value', ARGV[4], ARGV[3])
return 'completed'
