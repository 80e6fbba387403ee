-- Shared by every script, after prelude.lua: the outbox of webhooks.
-- A delivery is written by the script that makes the event true, under an id that is a function of job and event: a
-- job cannot end without its delivery, nor twice with two. It waits in the list of its receiver (scheme, host, port), so
-- that a receiver that is dead costs one look, however much waits for it.
--
--   latentq:delivery:<id>      what, where to, and every attempt        pending ──► sending ──► delivered
--   latentq:outbox             all that is pending or sending              ▲           │
--   latentq:due:<receiver>     pending, by when it is due                  └───────────┤
--   latentq:sending:<receiver> leased to a courier, by the lease's end                 └──► dead | dropped
local STOPPED, DEAD, COUNTS = P .. 'stopped', P .. 'dead-letters', P .. 'webhook-counts'

local function ring_couriers()
  call('LPUSH', P .. 'courier-bell', '1')
  call('LTRIM', P .. 'courier-bell', 0, 15)
  call('EXPIRE', P .. 'courier-bell', 3600)
end

local function put_due(id, receiver, due_ms)
  call('ZADD', P .. 'due:' .. receiver, int(due_ms), id)
  call('ZADD', RECEIVERS, 'LT', int(due_ms), receiver)
end

-- Enters a delivery. `fields`: those of its hash but the ones every new delivery has. `lives_ms`: how long it is tried.
local function enter(id, receiver, now, lives_ms, kept_ms, fields)
  local key = P .. 'delivery:' .. id
  call('HSET', key, 'receiver', receiver, 'state', 'pending', 'tries', '0', 'at_ms', int(now), 'due_ms', int(now),
    unpack(fields))
  call('PEXPIRE', key, int(lives_ms + kept_ms))
  call('ZADD', OUTBOX, int(now + lives_ms), id)
  put_due(id, receiver, now)
  ring_couriers()
end

local function leave_outbox(id, receiver)
  call('ZREM', OUTBOX, id)
  call('ZREM', P .. 'due:' .. receiver, id)
  call('ZREM', P .. 'sending:' .. receiver, id)
end

-- Something happened to a job: if it has a webhook that wants to know, a delivery is entered. `done`, `total`: of
-- progress. Admission has reserved room for the terminal one; the others go without when the outbox is full.
function announce(rec, event, now, done, total)
  local hook = rec.webhook and rec.webhook ~= '' and cjson.decode(rec.webhook)
  if not hook or not hook.events[event] then return end
  local id = 'msg_' .. rec.id .. '_' .. event .. (done and '_' .. done or '')
  local sure = RQ_STATUS[event]
  local before = call('HGET', P .. 'delivery:' .. id, 'receiver')
  if before then
    if not sure then return end -- a second attempt of the job is no second event
    -- A job ends once: this is of an older job of the same id, whose tombstone is gone.
    leave_outbox(id, before)
    call('ZREM', DEAD, id)
    call('DEL', P .. 'delivery:' .. id)
  end
  if not sure and call('ZCARD', OUTBOX) + (tonumber(call('HGET', TOTALS, 'webhooks')) or 0) >= hook.most then
    call('HINCRBY', COUNTS, 'dropped', 1)
    return
  end
  enter(id, hook.receiver, now, sure and hook.give_up_ms or hook.brief_ms, sure and hook.dead_ms or hook.brief_ms,
    { 'job', rec.id, 'event', event, 'url', hook.url, 'endpoint', hook.endpoint, 'signer', hook.signer,
      'inline', hook.inline and '1' or '0', 'sure', sure and '1' or '0', 'done', done or '0', 'total', total or '0' })
end

-- A job with a webhook ended: its place in the outbox is taken by its delivery, and its secret stays as long as that.
function webhook_ended(rec, state, now)
  if not rec.webhook or rec.webhook == '' then return end
  call('HINCRBY', TOTALS, 'webhooks', -1)
  announce(rec, state, now)
  local hook = cjson.decode(rec.webhook)
  if hook.signer == 'job:' .. rec.id then
    call('PEXPIRE', P .. 'webhook-secret:' .. hook.signer, int(hook.give_up_ms + hook.dead_ms))
  end
end

-- Gives a delivery up: a terminal event becomes a dead letter, the others are forgotten soon.
local function bury(id, reason, now, dead_ms, most)
  local key = P .. 'delivery:' .. id
  local known = call('HMGET', key, 'receiver', 'sure')
  if not known[1] then
    call('ZREM', OUTBOX, id)
    return
  end
  leave_outbox(id, known[1])
  local sure = known[2] == '1'
  call('HSET', key, 'state', sure and 'dead' or 'dropped', 'reason', reason, 'ended_ms', int(now), 'token', '')
  call('PEXPIRE', key, int(sure and dead_ms or 3600000))
  call('HINCRBY', COUNTS, sure and 'dead' or 'dropped', 1)
  if not sure then return end
  call('ZADD', DEAD, int(now + dead_ms), id)
  call('ZREMRANGEBYSCORE', DEAD, '-inf', int(now))
  while call('ZCARD', DEAD) > most do call('UNLINK', P .. 'delivery:' .. call('ZPOPMIN', DEAD)[1]) end
end
