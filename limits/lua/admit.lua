-- Admits one request, or says which limit denies it. All checks come before the first change, so a denial changes nothing.
--
-- ARGV[2]  "admit" or "look"      ARGV[5]  idempotency claim, or ""      ARGV[7]  API key id
-- ARGV[3]  request id             ARGV[6]  fingerprint of the body       ARGV[8]  what the ledger is to know (opaque)
-- ARGV[4]  numbers: ms until overdue, input tokens, output tokens asked, answers asked (n), thousandths of micro-dollars that
--          the input costs, micro-dollars for 1,000 output tokens, micro-dollars for input and output asked, rounded up
-- ARGV[9]  whether to cut the output to what the budgets pay for, the number of subjects that have limits, the number of all,
--          and nine values for each: name, requests a second, burst, tokens a minute, parallel requests, and of the daily and
--          of the monthly budget micro-dollars and tokens; nil where there is no such limit
--
-- Answers {"OK", ms of the admission, output granted, micro-dollars reserved, figures…}
--         {"DENIED", now ms, ms to wait or -1, code of the limit that denies, figures…}
--         {"RUNNING"} {"MISMATCH"} {"TOO_LARGE"} {"CLOSED"} {"REPLAY", status, headers, body}
-- A figure is four numbers: code, limit, remaining, ms until it is whole again; the server cuts off fractions. A code is 8 times
-- the subject (from 1) plus the kind: 1 requests, 2 tokens, 3 parallel, 4 and 5 daily micro-dollars and tokens, 6 and 7 monthly.

local now_s, now_ms, now_us = clock()
local look, id = ARGV[2] == 'look', ARGV[3]
local overdue_ms, tokens_input, asked, answers, input_cost, output_price, micro_usd = unpacked(ARGV[4])
local limits = {unpacked(ARGV[9])}

local claim = ARGV[5] ~= '' and prefix .. 'claim:' .. ARGV[5]
if claim then
  local held = call('HMGET', claim, 'fingerprint', 'state', 'owner')
  if held[1] then
    if held[1] ~= ARGV[6] then return {'MISMATCH'} end
    if held[2] == 'done' then
      local answer = call('HMGET', claim, 'status', 'headers', 'body')
      return {'REPLAY', answer[1], answer[2], answer[3]}
    end
    if held[2] == 'too_large' then return {'TOO_LARGE'} end
    if held[3] ~= id then return {'RUNNING'} end
  end
end

-- 1. Read. Budgets that were set take the place of those given; a subject without limits matters only where there are some.

local subjects = limits[2]
if call('EXISTS', prefix .. 'budgets') == 1 then
  subjects = limits[3]
  for subject = 1, subjects do
    local at = 9 * subject - 5
    local day, month = limits[at] .. ':DAILY:', limits[at] .. ':MONTHLY:'
    local set = call(
      'HMGET', prefix .. 'budgets', day .. 'micro_usd', day .. 'tokens', month .. 'micro_usd', month .. 'tokens'
    )
    for i = 1, 4 do
      if set[i] then limits[at + 4 + i] = tonumber(set[i]) end
    end
  end
end

-- The entry and, of each subject, its buckets, its day and its month.
local day, month, day_ends_s, month_ends_s = periods_at(now_s)
local keys = {prefix .. 'entry:' .. id}
for subject = 1, subjects do
  local name = limits[9 * subject - 5]
  local at, spend = 3 * subject, prefix .. 'spend:' .. name .. ':'
  keys[at - 1], keys[at], keys[at + 1] = prefix .. 'rate:' .. name, spend .. day, spend .. month
end
local stored = call('MGET', unpack(keys))

-- The same request again, because the answer to the first call was lost: nothing is counted twice.
local counting, admitted_ms = not look, now_ms
if counting and stored[1] then
  local opened = stored[1] ~= CLOSED and {unpacked(stored[1])}
  if not opened or opened[STATE] ~= 'open' then return {'CLOSED'} end
  counting, admitted_ms, asked, micro_usd = false, opened[ADMITTED_MS], opened[TOKENS_OUTPUT], opened[MICRO_USD]
end

local budgets = {}
for subject = 1, subjects do
  local at = 9 * subject - 5
  for period = 0, 1 do
    local usd, tokens = limits[at + 5 + 2 * period], limits[at + 6 + 2 * period]
    -- An organisation's use is counted without a budget too, so that one set later knows of it.
    if usd or tokens or limits[at] == 'org' then
      local place = 3 * subject + period
      local use = use_of(stored[place])
      budgets[#budgets + 1] = {
        code = 8 * subject + 4 + 2 * period, place = place, use = use, usd = usd, tokens = tokens,
        usd_left = usd and usd + use[CREDITED_MICRO_USD] - use[SPENT_MICRO_USD] - use[RESERVED_MICRO_USD],
        tokens_left = tokens and tokens + use[CREDITED_TOKENS] - use[SPENT_TOKENS] - use[RESERVED_TOKENS],
        whole_ms = (period == 0 and day_ends_s or month_ends_s) * 1000 - now_ms,
      }
    end
  end
end

-- 2. What the request may cost: the output is cut to what every budget pays for.

local EXACT_MAX = 9e12 -- times 1,000 it is still a whole number in a double
local output = asked
if counting and asked > 0 and limits[1] then
  for i = 1, #budgets do
    local budget = budgets[i]
    if budget.tokens then output = min(output, budget.tokens_left - tokens_input) end
    if budget.usd and output_price > 0 then
      output = min(output, floor((min(budget.usd_left, EXACT_MAX) * 1000 - input_cost) / output_price))
    end
  end
  output = floor(output / answers) * answers
  if output < answers then
    output = asked -- nothing sensible is left: denied below, with the figures of the whole request
  elseif output < asked then
    micro_usd = math.ceil((input_cost + output * output_price) / 1000)
  end
end
local tokens = tokens_input + output

-- 3. Hold it against every limit.

local denier, wait_ms = nil, 0
-- A budget outweighs a rate, because waiting does not help; of the rates the one with the longest wait tells the truth.
local function deny(code, ms)
  if counting and wait_ms ~= -1 and (not denier or ms == -1 or ms > wait_ms) then denier, wait_ms = code, ms end
end

for i = 1, #budgets do
  local budget = budgets[i]
  -- What is overspent does not stand in the way of what is free.
  if budget.usd and micro_usd > max(0, budget.usd_left) then deny(budget.code, -1) end
  if budget.tokens and tokens > max(0, budget.tokens_left) then deny(budget.code + 1, -1) end
end

-- What a bucket holds now. A clock that went back adds nothing and takes nothing.
local function level_of(level, since_us, capacity, per_s)
  if not level then return capacity end
  if since_us < now_us then level = level + (now_us - since_us) * per_s / 1000000 end
  return level < capacity and level or capacity
end

local SLACK = 1e-6
local CLOCK_MS = 0.01 -- what whole microseconds may hide of a wait
local SLOT_WAIT_MS = 1000 -- nobody knows when a running request ends
local rates = {}
for subject = 1, subjects do
  local at, key = 9 * subject - 5, 3 * subject - 1
  local per_s, burst, per_minute, parallel = limits[at + 1], limits[at + 2], limits[at + 3], limits[at + 4]
  local requests_left, tokens_left, since_us, resets, slots_left
  if stored[key] then requests_left, tokens_left, since_us, resets = unpacked(stored[key]) end
  requests_left = per_s and level_of(requests_left, since_us, burst, per_s) or nil
  if per_s and requests_left < 1 - SLACK then
    deny(8 * subject + 1, floor((1 - requests_left) / per_s * 1000 + CLOCK_MS) + 1)
  end
  tokens_left = per_minute and level_of(tokens_left, since_us, per_minute, per_minute / 60) or nil
  if per_minute then
    -- Where more is needed than a bucket can ever hold, a full one will do, and its level falls below zero.
    local short = min(tokens, per_minute) - tokens_left
    if short > SLACK then deny(8 * subject + 2, floor(short / per_minute * 60000 + CLOCK_MS) + 1) end
  end
  if parallel then
    slots_left = parallel - call('ZCOUNT', prefix .. 'parallel:' .. limits[at], now_ms, '+inf')
    if slots_left < 1 then deny(8 * subject + 3, SLOT_WAIT_MS) end
  end
  -- Left as it is, a moment in the future would stop the refill until the clock gets there.
  if since_us and since_us > now_us and not look then
    call('SET', keys[key], pack(requests_left, tokens_left, now_us, resets), 'KEEPTTL')
  end
  rates[subject] = {
    requests_left = requests_left, tokens_left = tokens_left, slots_left = slots_left, resets = resets or 0, full_ms = 0,
  }
end

-- 4. The answer: what remains after this request, where it is counted now.

local answer = denier and {'DENIED', now_ms, wait_ms, denier} or {'OK', admitted_ms, output, micro_usd}
local counted = counting and not denier
local taken_requests, taken_tokens, taken_micro_usd = 0, 0, 0
if counted then taken_requests, taken_tokens, taken_micro_usd = 1, tokens, micro_usd end

local n = 4
for i = 1, #budgets do
  local budget = budgets[i]
  local code, whole_ms = budget.code, budget.whole_ms
  if budget.usd then
    answer[n + 1], answer[n + 2], answer[n + 3], answer[n + 4] = code, budget.usd, budget.usd_left - taken_micro_usd, whole_ms
    n = n + 4
  end
  if budget.tokens then
    answer[n + 1], answer[n + 2], answer[n + 3], answer[n + 4] =
      code + 1, budget.tokens, budget.tokens_left - taken_tokens, whole_ms
    n = n + 4
  end
end
local NEARLY = 0.999 -- rounds up where a fraction is cut off
for subject = 1, subjects do
  local at, code, rate = 9 * subject - 5, 8 * subject, rates[subject]
  if rate.requests_left then
    local burst, left = limits[at + 2], rate.requests_left - taken_requests
    local full_ms = (burst - left) / limits[at + 1] * 1000
    answer[n + 1], answer[n + 2], answer[n + 3], answer[n + 4] = code + 1, burst, max(0, left + SLACK), full_ms + NEARLY
    n, rate.requests_left, rate.full_ms = n + 4, left, full_ms
  end
  if rate.tokens_left then
    local per_minute, left = limits[at + 3], rate.tokens_left - taken_tokens
    local full_ms = (per_minute - left) / per_minute * 60000
    answer[n + 1], answer[n + 2], answer[n + 3], answer[n + 4] = code + 2, per_minute, max(0, left + SLACK), full_ms + NEARLY
    n, rate.tokens_left, rate.full_ms = n + 4, left, max(rate.full_ms, full_ms)
  end
  if rate.slots_left then
    answer[n + 1], answer[n + 2], answer[n + 3], answer[n + 4] =
      code + 3, limits[at + 4], max(0, rate.slots_left - taken_requests), 0
    n = n + 4
  end
end
if not counted then return answer end

-- 5. Count it, and open the ledger entry.

local RATE_KEPT_MAX_MS = 366 * 86400000 -- less where it is full before: a full bucket need not be kept
local SLOT_KEPT_MS = 300000 -- a slot that nobody frees is not lost for longer; who still runs is put off by extend.lua
local deadline_ms = now_ms + overdue_ms
local touched, rated = {}, 0
for i = 1, #budgets do
  local key, use = keys[budgets[i].place], budgets[i].use
  use[RESERVED_TOKENS], use[RESERVED_MICRO_USD] = use[RESERVED_TOKENS] + tokens, use[RESERVED_MICRO_USD] + micro_usd
  save_use(key, use, stored[budgets[i].place])
  touched[2 * i - 1], touched[2 * i] = key, use[RESETS]
end
for subject = 1, subjects do
  local key, rate = keys[3 * subject - 1], rates[subject]
  if rate.requests_left or rate.tokens_left then
    local state = pack(rate.requests_left, rate.tokens_left, now_us, rate.resets)
    call('SET', key, state, 'PX', floor(min(rate.full_ms + 60000, RATE_KEPT_MAX_MS)))
  end
  if rate.tokens_left then
    touched[#touched + 1], touched[#touched + 2] = key, rate.resets
    rated = rated + 1
  end
end
for subject = 1, subjects do
  if rates[subject].slots_left then
    local set = prefix .. 'parallel:' .. limits[9 * subject - 5]
    call('ZADD', set, now_ms + min(overdue_ms, SLOT_KEPT_MS), id)
    touched[#touched + 1] = set
  end
end
call('ZADD', prefix .. 'open', deadline_ms, id)
call('SET', keys[1], pack(
  'open', deadline_ms, now_ms, tokens_input, output, micro_usd, claim or '', ARGV[7], ARGV[8], #budgets, rated, unpack(touched)
))
if claim then
  call('HSET', claim, 'fingerprint', ARGV[6], 'state', 'running', 'owner', id)
  call('PEXPIRE', claim, overdue_ms)
end
return answer
