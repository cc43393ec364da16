-- Admits one request, or says which limit denies it. All checks come before the first change, so a denial changes nothing.
--
-- ARGV[2]  "admit" or "look"     ARGV[6]  idempotency claim, or ""      ARGV[8]  API key id
-- ARGV[3]  ms until overdue      ARGV[7]  fingerprint of the body       ARGV[9]  what the ledger is to know (opaque)
-- ARGV[4]  request id            ARGV[10] "1": cut the output to what the budgets pay for
-- ARGV[5]  six numbers: input tokens, output tokens asked, answers asked (n), thousandths of micro-dollars that the input
--          costs, micro-dollars for 1,000 output tokens, micro-dollars for input and output asked, rounded up
-- ARGV[11] subjects that have limits, then nine for each: name, requests a second, burst, tokens a minute, parallel requests,
--          and of the daily and of the monthly budget micro-dollars and tokens; "" where there is no such limit. What follows
--          are subjects without any, which are looked at only where budgets have been set.
--
-- Answers {"OK", now ms, output granted, micro-dollars reserved, figures…}
--         {"DENIED", now ms, ms to wait or -1, code of the limit that denies, figures…}
--         {"RUNNING"} {"MISMATCH"} {"TOO_LARGE"} {"CLOSED"} {"REPLAY", status, headers, body}
-- A figure is four numbers: code, limit, remaining, ms until it is whole again. A code is 8 times the subject (from 1) plus
-- the kind: 1 requests, 2 tokens, 3 parallel, 4 and 5 daily micro-dollars and tokens, 6 and 7 monthly.

local look, id = ARGV[2] == 'look', ARGV[4]
local a, b, c, d, e, f = string.match(ARGV[5], '(%d+) (%d+) (%d+) (%d+) (%d+) (%d+)')
local tokens_input, asked, answers = amount(a), amount(b), tonumber(c)
local input_cost, output_price, micro_usd = tonumber(d), tonumber(e), amount(f)

local claim = ARGV[6] ~= '' and prefix .. 'claim:' .. ARGV[6]
if claim then
  local held = call('HMGET', claim, 'fingerprint', 'state', 'owner')
  if held[1] then
    if held[1] ~= ARGV[7] then return {'MISMATCH'} end
    if held[2] == 'done' then
      local answer = call('HMGET', claim, 'status', 'headers', 'body')
      return {'REPLAY', answer[1], answer[2], answer[3]}
    end
    if held[2] == 'too_large' then return {'TOO_LARGE'} end
    if held[3] ~= id then return {'RUNNING'} end
  end
end

-- 1. Read the entry and, of each subject, its buckets, its day and its month.

local overridden = call('EXISTS', prefix .. 'budgets') == 1
local subjects = overridden and (#ARGV - 11) / 9 or tonumber(ARGV[11])
local day, month, day_ends_s, month_ends_s = periods_at(now_s)
local keys = {prefix .. 'entry:' .. id}
for subject = 1, subjects do
  local name = ARGV[3 + 9 * subject]
  local spend = prefix .. 'spend:' .. name .. ':'
  keys[3 * subject - 1], keys[3 * subject], keys[3 * subject + 1] = prefix .. 'rate:' .. name, spend .. day, spend .. month
end
local stored = call('MGET', unpack(keys))

-- The same request again, because the answer to the first call was lost: nothing is counted twice.
local counting = not look
if counting and stored[1] then
  local opened = stored[1] ~= CLOSED and unpacked(stored[1])
  if not opened or opened[STATE] ~= 'open' then return {'CLOSED'} end
  counting, asked, micro_usd = false, opened[TOKENS_OUTPUT], opened[MICRO_USD]
end

local function limit_of(name, budget, given)
  return tonumber(overridden and call('HGET', prefix .. 'budgets', name .. budget) or given)
end

local budgets = {}
local function add_budget(subject, kind, period, at, place, ends_s)
  local name = ARGV[3 + 9 * subject]
  local usd, tokens = limit_of(name, period .. 'micro_usd', ARGV[at]), limit_of(name, period .. 'tokens', ARGV[at + 1])
  -- An organisation's use is counted without a budget too, so that one set later knows of it.
  if not usd and not tokens and name ~= 'org' then return end
  local use = use_of(stored[place])
  budgets[#budgets + 1] = {
    code = 8 * subject + kind, place = place, use = use, whole_ms = ends_s * 1000 - now_ms, usd = usd, tokens = tokens,
    usd_left = usd and usd + use[CREDITED_MICRO_USD] - use[SPENT_MICRO_USD] - use[RESERVED_MICRO_USD],
    tokens_left = tokens and tokens + use[CREDITED_TOKENS] - use[SPENT_TOKENS] - use[RESERVED_TOKENS],
  }
end
for subject = 1, subjects do
  add_budget(subject, 4, ':DAILY:', 8 + 9 * subject, 3 * subject, day_ends_s)
  add_budget(subject, 6, ':MONTHLY:', 10 + 9 * subject, 3 * subject + 1, month_ends_s)
end

-- 2. What the request may cost: the output is cut to what every budget pays for.

local EXACT_MAX = 9e12 -- times 1,000 it is still a whole number in a double
local output = asked
if counting and asked > 0 and ARGV[10] == '1' then
  for _, budget in ipairs(budgets) do
    if budget.tokens then output = min(output, budget.tokens_left - tokens_input) end
    if budget.usd and output_price > 0 then
      local left = min(budget.usd_left, EXACT_MAX) * 1000 - input_cost
      output = min(output, floor(left / output_price))
    end
  end
  output = floor(output / answers) * answers
  if output < answers then
    output = asked -- nothing sensible is left: denied below, with the figures of the whole request
  elseif output < asked then
    micro_usd = ceil((input_cost + output * output_price) / 1000)
  end
end
local tokens = tokens_input + output

-- 3. Hold it against every limit.

local denier, wait_ms = nil, 0
-- A budget outweighs a rate, because waiting does not help; of the rates the one with the longest wait tells the truth.
local function deny(code, ms)
  if counting and wait_ms ~= -1 and (not denier or ms == -1 or ms > wait_ms) then denier, wait_ms = code, ms end
end

for _, budget in ipairs(budgets) do
  -- What is overspent does not stand in the way of what is free.
  if budget.usd and micro_usd > max(0, budget.usd_left) then deny(budget.code, -1) end
  if budget.tokens and tokens > max(0, budget.tokens_left) then deny(budget.code + 1, -1) end
end

-- What a bucket holds now. A clock that went back adds nothing and takes nothing.
local function level_of(level, since_us, capacity, per_s)
  if not level then return capacity end
  return min(capacity, level + max(0, now_us - since_us) * per_s / 1000000)
end

-- Where more is needed than a bucket can ever hold, a full one will do, and its level falls below zero.
local SLACK = 1e-6
local function need_of(code, need, level, capacity, per_s)
  local short = min(need, capacity) - level
  if short > SLACK then deny(code, floor(short / per_s * 1000) + 1) end
end

local SLOT_WAIT_MS = 1000 -- nobody knows when a running request ends
local rates = {}
for subject = 1, subjects do
  local at, key = 3 + 9 * subject, 3 * subject - 1
  local rate = {
    per_s = tonumber(ARGV[at + 1]), burst = tonumber(ARGV[at + 2]),
    per_minute = tonumber(ARGV[at + 3]), parallel = tonumber(ARGV[at + 4]), resets = 0,
  }
  local requests_left, tokens_left, since_us
  if stored[key] then requests_left, tokens_left, since_us, rate.resets = unpacked(stored[key]) end
  if rate.per_s then
    rate.requests_left = level_of(requests_left, since_us, rate.burst, rate.per_s)
    need_of(8 * subject + 1, 1, rate.requests_left, rate.burst, rate.per_s)
  end
  if rate.per_minute then
    rate.tokens_left = level_of(tokens_left, since_us, rate.per_minute, rate.per_minute / 60)
    need_of(8 * subject + 2, tokens, rate.tokens_left, rate.per_minute, rate.per_minute / 60)
  end
  if rate.parallel then
    rate.slots_left = rate.parallel - call('ZCOUNT', prefix .. 'parallel:' .. ARGV[at], whole(now_ms), '+inf')
    if rate.slots_left < 1 then deny(8 * subject + 3, SLOT_WAIT_MS) end
  end
  -- Left as it is, a moment in the future would stop the refill until the clock gets there.
  if since_us and since_us > now_us and not look then
    call('SET', keys[key], pack(requests_left, tokens_left, now_us, rate.resets), 'KEEPTTL')
  end
  rates[subject] = rate
end

-- 4. The answer: what remains after this request, where it is counted now.

local answer = denier and {'DENIED', now_ms, wait_ms, denier} or {'OK', now_ms, output, micro_usd}
local counted = counting and not denier
local size = 4
local function figure(code, limit, remaining, whole_ms)
  answer[size + 1], answer[size + 2], answer[size + 3] = code, limit, floor(remaining)
  answer[size + 4] = ceil(max(0, whole_ms))
  size = size + 4
end

for _, budget in ipairs(budgets) do
  local use = budget.use
  if counted then
    use[RESERVED_TOKENS], use[RESERVED_MICRO_USD] = use[RESERVED_TOKENS] + tokens, use[RESERVED_MICRO_USD] + micro_usd
  end
  if budget.usd then
    figure(budget.code, budget.usd, budget.usd_left - (counted and micro_usd or 0), budget.whole_ms)
  end
  if budget.tokens then
    figure(budget.code + 1, budget.tokens, budget.tokens_left - (counted and tokens or 0), budget.whole_ms)
  end
end
for subject, rate in ipairs(rates) do
  rate.full_ms = 0
  if rate.per_s then
    if counted then rate.requests_left = rate.requests_left - 1 end
    local full_ms = (rate.burst - rate.requests_left) / rate.per_s * 1000
    figure(8 * subject + 1, rate.burst, max(0, rate.requests_left + SLACK), full_ms)
    rate.full_ms = full_ms
  end
  if rate.per_minute then
    if counted then rate.tokens_left = rate.tokens_left - tokens end
    local full_ms = (rate.per_minute - rate.tokens_left) / rate.per_minute * 60000
    figure(8 * subject + 2, rate.per_minute, max(0, rate.tokens_left + SLACK), full_ms)
    rate.full_ms = max(rate.full_ms, full_ms)
  end
  if rate.parallel then
    figure(8 * subject + 3, rate.parallel, max(0, rate.slots_left - (counted and 1 or 0)), 0)
  end
end
if not counted then return answer end

-- 5. Count it, and open the ledger entry.

local RATE_KEPT_MAX_MS = 366 * 86400000 -- less where it is full before: a full bucket need not be kept
local deadline_ms = now_ms + tonumber(ARGV[3])
local deadline = whole(deadline_ms)
local spends, rated, parallels = {}, {}, {}
for _, budget in ipairs(budgets) do
  local key = keys[budget.place]
  save_use(key, budget.use, stored[budget.place])
  spends[#spends + 1], spends[#spends + 2] = key, budget.use[RESETS]
end
for subject, rate in ipairs(rates) do
  local key = keys[3 * subject - 1]
  if rate.per_s or rate.per_minute then
    local state = pack(rate.requests_left, rate.tokens_left, now_us, rate.resets)
    call('SET', key, state, 'PX', whole(min(rate.full_ms + 60000, RATE_KEPT_MAX_MS)))
    if rate.per_minute then rated[#rated + 1], rated[#rated + 2] = key, rate.resets end
  end
  if rate.parallel then
    local set = prefix .. 'parallel:' .. ARGV[3 + 9 * subject]
    call('ZADD', set, deadline, id)
    parallels[#parallels + 1] = set
  end
end
call('ZADD', prefix .. 'open', deadline, id)
call('SET', keys[1], pack({
  'open', deadline_ms, now_ms, tokens_input, output, micro_usd, spends, rated, parallels, claim or '', ARGV[8], ARGV[9],
}))
if claim then
  call('HSET', claim, 'fingerprint', ARGV[7], 'state', 'running', 'owner', id)
  call('PEXPIRE', claim, ARGV[3])
end
return answer
