-- Closes the entry of a request, once: the reservation goes, what was used takes its place.
--
-- ARGV[2]  "settle", or "expire": close with what was reserved, if it is overdue
-- ARGV[3]  request id
-- ARGV[4]  tokens used           ARGV[6]  unix seconds of the admission, for a request that has no entry
-- ARGV[5]  micro-dollars         ARGV[7]  what such a request is to be charged to: "org:DAILY org:MONTHLY …", or ""
--
-- Answers {"SETTLED" or "EXPIRED" or "CHARGED" (there was no entry) or "REPEATED" or "NONE", tokens, micro-dollars charged
-- now: for an entry that had expired before, the difference}

local CLOSED_KEPT_MS = '600000' -- as long as an access log entry may come twice
local EXPIRED_KEPT_MS = '86400000' -- as long as it may come late
local OVERDRAWN_KEPT_MS = '86400000'

local expire, id = ARGV[2] == 'expire', ARGV[3]
local tokens, micro_usd = amount(ARGV[4]), amount(ARGV[5])
local entry = prefix .. 'entry:' .. id

local stored = call('GET', entry)
if stored == CLOSED then return {'REPEATED', 0, 0} end
if not stored then
  if expire then
    call('ZREM', prefix .. 'open', id)
    return {'NONE', 0, 0}
  end
  local function unquoted(text)
    return (string.gsub(text, '%%(%x%x)', function(hex) return string.char(tonumber(hex, 16)) end))
  end
  local day, month = periods_at(tonumber(ARGV[6]))
  for subject, period in string.gmatch(ARGV[7], '(%S+):(%u+)') do
    local key = prefix .. 'spend:' .. unquoted(subject) .. ':' .. (period == 'DAILY' and day or month)
    local before = call('GET', key)
    local use = use_of(before)
    add(use, SPENT_TOKENS, tokens)
    add(use, SPENT_MICRO_USD, micro_usd)
    save_use(key, use, before)
  end
  call('SET', entry, CLOSED, 'PX', CLOSED_KEPT_MS)
  return {'CHARGED', tokens, micro_usd}
end

local opened = unpacked(stored)
local expired = opened[STATE] == 'expired'
if expire and (expired or opened[DEADLINE_MS] > now_ms) then return {'NONE', 0, 0} end

local reserved_tokens, reserved_micro_usd = opened[TOKENS_INPUT] + opened[TOKENS_OUTPUT], opened[MICRO_USD]
if expire then tokens, micro_usd = reserved_tokens, reserved_micro_usd end
local more_tokens, more_micro_usd = tokens - reserved_tokens, micro_usd - reserved_micro_usd

-- 1. Periods. An expired entry has been spent as it was reserved; only the difference is left to book.

for i = 1, #opened[SPENDS], 2 do
  local key, resets_seen = opened[SPENDS][i], opened[SPENDS][i + 1]
  local before = call('GET', key)
  local use = use_of(before)
  if expired then
    add(use, SPENT_TOKENS, more_tokens)
    add(use, SPENT_MICRO_USD, more_micro_usd)
  else
    add(use, RESERVED_TOKENS, -reserved_tokens)
    add(use, RESERVED_MICRO_USD, -reserved_micro_usd)
    add(use, SPENT_TOKENS, tokens)
    add(use, SPENT_MICRO_USD, micro_usd)
  end
  if use[RESETS] > resets_seen then -- a reset has forgiven the reservation, so it forgives the difference too
    add(use, CREDITED_TOKENS, more_tokens)
    add(use, CREDITED_MICRO_USD, more_micro_usd)
  end
  save_use(key, use, before)
end

if expired then
  call('SET', entry, CLOSED, 'PX', CLOSED_KEPT_MS)
  return {'SETTLED', more_tokens, more_micro_usd}
end

-- 2. Token buckets get back what was not used, unless a reset has filled them since. Where one is gone it was full; what is
-- over its capacity the next look cuts.

for i = 1, more_tokens ~= 0 and #opened[RATED] or 0, 2 do
  local key, resets_seen = opened[RATED][i], opened[RATED][i + 1]
  local before = call('GET', key)
  if before then
    local requests_left, tokens_left, since_us, resets = unpacked(before)
    if tokens_left and resets == resets_seen then
      local state = pack(requests_left, tokens_left - more_tokens, since_us, resets)
      if more_tokens > 0 then -- it takes longer to be full again than it would have been kept
        call('SET', key, state, 'PX', OVERDRAWN_KEPT_MS)
      else
        call('SET', key, state, 'KEEPTTL')
      end
    end
  end
end

-- 3. It no longer runs.

for _, key in ipairs(opened[PARALLEL]) do call('ZREM', key, id) end
call('ZREM', prefix .. 'open', id)

-- A claim that is still running has no answer to repeat: the next request with its key is the first again.
local claim = opened[CLAIM]
if claim ~= '' then
  local held = call('HMGET', claim, 'state', 'owner')
  if held[1] == 'running' and held[2] == id then call('DEL', claim) end
end

if expire then
  opened[STATE] = 'expired'
  call('SET', entry, pack(opened), 'PX', EXPIRED_KEPT_MS)
  return {'EXPIRED', tokens, micro_usd}
end
call('SET', entry, CLOSED, 'PX', CLOSED_KEPT_MS)
return {'SETTLED', tokens, micro_usd}
