-- What a worker tells RQ about itself, also past maxmemory: without it a full broker would lose sight of the workers
-- that empty it. ARGV: commands as RQ's own code made them (JSON list of lists). Returns what each answered.
local out = {}
for i, command in ipairs(cjson.decode(ARGV[1])) do
  local answer = call(unpack(command))
  out[i] = type(answer) == 'number' and answer or 1
end
return out
