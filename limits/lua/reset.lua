-- Forgets what an organisation or a key has used, so that its next request passes. What is open stays open and is still
-- settled: a budget is credited with what was spent and reserved, never set to zero, so that sums stay true.
--
-- ARGV[2…]  subjects
--
-- Answers for every period that was credited: subject and period, tokens, micro-dollars.

local RATE_KEPT_MS = 86400000 -- so that it is known to whoever settles what was open
local now_s, _, now_us = clock()
local day, month = periods_at(now_s)
local credited = {}
for i = 2, #ARGV do
  call('DEL', prefix .. 'parallel:' .. ARGV[i])
  local rate = prefix .. 'rate:' .. ARGV[i]
  local buckets = call('GET', rate)
  if buckets then
    local _, _, _, resets = unpacked(buckets)
    call('SET', rate, pack(nil, nil, now_us, resets + 1), 'PX', RATE_KEPT_MS)
  end
  for _, period in ipairs({day, month}) do
    local key = prefix .. 'spend:' .. ARGV[i] .. ':' .. period
    local before = call('GET', key)
    if before then
      local use = use_of(before)
      local tokens = use[SPENT_TOKENS] + use[RESERVED_TOKENS] - use[CREDITED_TOKENS]
      local micro_usd = use[SPENT_MICRO_USD] + use[RESERVED_MICRO_USD] - use[CREDITED_MICRO_USD]
      use[CREDITED_TOKENS], use[CREDITED_MICRO_USD] = use[CREDITED_TOKENS] + tokens, use[CREDITED_MICRO_USD] + micro_usd
      use[RESETS] = use[RESETS] + 1
      save_use(key, use, before)
      for _, value in ipairs({ARGV[i] .. ':' .. period, tokens, micro_usd}) do credited[#credited + 1] = value end
    end
  end
end
return credited
