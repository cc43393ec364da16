-- Closes the entry of a request, once: the reservation goes, what was used takes its place.
--
-- ARGV[2]  "settle", or "expire": close with what was reserved, if it is overdue
-- ARGV[3]  request id
-- ARGV[4]  numbers: tokens used, micro-dollars, and unix seconds of the admission, for a request that has no entry
-- ARGV[5]  what such a request is to be charged to: "org:DAILY org:MONTHLY …", or ""
--
-- Answers {"SETTLED" or "EXPIRED" or "CHARGED" (there was no entry) or "REPEATED" or "NONE", tokens, micro-dollars charged
-- now: for an entry that had expired before, the difference}

local CLOSED_KEPT_MS = 600000 -- as long as an access log entry may come twice
local EXPIRED_KEPT_MS = 86400000 -- as long as it may come late
local OVERDRAWN_KEPT_MS = 86400000

local expire, id = ARGV[2] == 'expire', ARGV[3]
local tokens, micro_usd, admitted_s = unpacked(ARGV[4])
local entry = prefix .. 'entry:' .. id

local stored = call('GET', entry)
if stored == CLOSED then return {'REPEATED', 0, 0} end
if not stored then
  if expire then
    call('ZREM', prefix .. 'open', id)
    return {'NONE', 0, 0}
  end
  local day, month = periods_at(admitted_s)
  for subject, period in string.gmatch(ARGV[5], '(%S+):(%u+)') do
    local name = string.gsub(subject, '%%(%x%x)', function(hex) return string.char(tonumber(hex, 16)) end)
    local key = prefix .. 'spend:' .. name .. ':' .. (period == 'DAILY' and day or month)
    local before = call('GET', key)
    local use = use_of(before)
    use[SPENT_TOKENS], use[SPENT_MICRO_USD] = use[SPENT_TOKENS] + tokens, use[SPENT_MICRO_USD] + micro_usd
    save_use(key, use, before)
  end
  call('SET', entry, CLOSED, 'PX', CLOSED_KEPT_MS)
  return {'CHARGED', tokens, micro_usd}
end

local opened = {unpacked(stored)}
local expired = opened[STATE] == 'expired'
if expire then
  local _, now_ms = clock()
  if expired or opened[DEADLINE_MS] > now_ms then return {'NONE', 0, 0} end
end

local reserved_tokens, reserved_micro_usd = opened[TOKENS_INPUT] + opened[TOKENS_OUTPUT], opened[MICRO_USD]
if expire then tokens, micro_usd = reserved_tokens, reserved_micro_usd end
local more_tokens, more_micro_usd = tokens - reserved_tokens, micro_usd - reserved_micro_usd

-- 1. Periods. An expired entry has been spent as it was reserved; only the difference is left to book.

local spent_tokens, spent_micro_usd = tokens, micro_usd
local freed_tokens, freed_micro_usd = reserved_tokens, reserved_micro_usd
if expired then
  spent_tokens, spent_micro_usd, freed_tokens, freed_micro_usd = more_tokens, more_micro_usd, 0, 0
end
local keys, periods, rated = {}, opened[PERIODS], opened[RATED]
for i = 1, periods + rated do keys[i] = opened[ENTRY_SIZE + 2 * i - 1] end
local before = periods + rated > 0 and call('MGET', unpack(keys)) or {}
for i = 1, periods do
  local use, resets_seen = use_of(before[i]), opened[ENTRY_SIZE + 2 * i]
  -- Nothing is ever less than nothing, even where the server has lost some of its keys.
  use[RESERVED_TOKENS] = max(0, use[RESERVED_TOKENS] - freed_tokens)
  use[RESERVED_MICRO_USD] = max(0, use[RESERVED_MICRO_USD] - freed_micro_usd)
  use[SPENT_TOKENS] = max(0, use[SPENT_TOKENS] + spent_tokens)
  use[SPENT_MICRO_USD] = max(0, use[SPENT_MICRO_USD] + spent_micro_usd)
  if use[RESETS] > resets_seen then -- a reset has forgiven the reservation, so it forgives the difference too
    use[CREDITED_TOKENS] = max(0, use[CREDITED_TOKENS] + more_tokens)
    use[CREDITED_MICRO_USD] = max(0, use[CREDITED_MICRO_USD] + more_micro_usd)
  end
  save_use(keys[i], use, before[i])
end

if expired then
  call('SET', entry, CLOSED, 'PX', CLOSED_KEPT_MS)
  return {'SETTLED', more_tokens, more_micro_usd}
end

-- 2. Token buckets get back what was not used, unless a reset has filled them since. Where one is gone it was full; what is
-- over its capacity the next look cuts.

for i = periods + 1, more_tokens ~= 0 and periods + rated or 0 do
  if before[i] then
    local requests_left, tokens_left, since_us, resets = unpacked(before[i])
    if tokens_left and resets == opened[ENTRY_SIZE + 2 * i] then
      local state = pack(requests_left, tokens_left - more_tokens, since_us, resets)
      if more_tokens > 0 then -- it takes longer to be full again than it would have been kept
        call('SET', keys[i], state, 'PX', OVERDRAWN_KEPT_MS)
      else
        call('SET', keys[i], state, 'KEEPTTL')
      end
    end
  end
end

-- 3. It no longer runs.

for i = ENTRY_SIZE + 2 * (periods + rated) + 1, #opened do call('ZREM', opened[i], id) end
call('ZREM', prefix .. 'open', id)

-- A claim that is still running has no answer to repeat: the next request with its key is the first again.
local claim = opened[CLAIM]
if claim ~= '' then
  local held = call('HMGET', claim, 'state', 'owner')
  if held[1] == 'running' and held[2] == id then call('DEL', claim) end
end

if expire then
  opened[STATE] = 'expired'
  call('SET', entry, pack(unpack(opened)), 'PX', EXPIRED_KEPT_MS)
  return {'EXPIRED', tokens, micro_usd}
end
call('SET', entry, CLOSED, 'PX', CLOSED_KEPT_MS)
return {'SETTLED', tokens, micro_usd}
