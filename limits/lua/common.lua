-- What every script shares. Source: docs/limits.md, which has the table of the keys.
--
-- KEYS[1]  names the hash slot: a key of the organisation. Every key that a script touches begins with ARGV[1].
-- ARGV[1]  prefix, "router:{<organisation>}:"
--
-- Money is micro-dollars, times are unix microseconds unless a name says otherwise. What only scripts read and every request
-- writes is MessagePack: half the time of a hash, and numbers keep all their digits.

local call, pack, unpacked = redis.call, cmsgpack.pack, cmsgpack.unpack
local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max
local prefix = ARGV[1]

local function whole(number) return string.format('%.0f', number) end

local time = call('TIME')
local now_s = tonumber(time[1])
local now_us = now_s * 1000000 + time[2]
local now_ms = floor(now_us / 1000)

-- The civil date of a count of days since 1970-01-01, and back (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms").
local function civil(days)
  local z = days + 719468
  local era = floor(z / 146097)
  local of_era = z - era * 146097
  local year_of_era = floor(
    (of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365
  )
  local of_year = of_era - (365 * year_of_era + floor(year_of_era / 4) - floor(year_of_era / 100))
  local shifted = floor((5 * of_year + 2) / 153)
  local day = of_year - floor((153 * shifted + 2) / 5) + 1
  local month = shifted < 10 and shifted + 3 or shifted - 9
  return year_of_era + era * 400 + (month <= 2 and 1 or 0), month, day
end

local function days_of(year, month, day)
  if month <= 2 then year = year - 1 end
  local era = floor(year / 400)
  local year_of_era = year - era * 400
  local of_year = floor((153 * (month > 2 and month - 3 or month + 9) + 2) / 5) + day - 1
  local of_era = year_of_era * 365 + floor(year_of_era / 4) - floor(year_of_era / 100) + of_year
  return era * 146097 + of_era - 719468
end

-- Names of the day and the month that a moment lies in, and the seconds at which they end. UTC.
local function periods_at(seconds)
  local days = floor(seconds / 86400)
  local year, month, day = civil(days)
  local month_ends = month == 12 and days_of(year + 1, 1, 1) or days_of(year, month + 1, 1)
  local date = string.format('%04d-%02d-%02d', year, month, day)
  return 'DAILY:' .. date, 'MONTHLY:' .. string.sub(date, 1, 7), (days + 1) * 86400, month_ends * 86400
end

-- What a subject has used of a period: a list of these. Credited is what resets have forgiven, and resets how many there were.
local SPENT_TOKENS, SPENT_MICRO_USD, RESERVED_TOKENS, RESERVED_MICRO_USD = 1, 2, 3, 4
local CREDITED_TOKENS, CREDITED_MICRO_USD, RESETS = 5, 6, 7

local function use_of(stored) return stored and unpacked(stored) or {0, 0, 0, 0, 0, 0, 0} end

-- Nothing is ever less than nothing, even where the server has lost some of its keys.
local function add(use, what, more) use[what] = max(0, use[what] + more) end

-- It outlives its period, so that what comes late still finds it.
local DAY_KEPT_S, MONTH_KEPT_S = 15 * 86400, 101 * 86400

local function save_use(key, use, stored)
  if stored then
    call('SET', key, pack(use), 'KEEPTTL')
  else
    local kept_s = string.find(key, ':MONTHLY:', 1, true) and MONTH_KEPT_S or DAY_KEPT_S
    call('SET', key, pack(use), 'EX', whole(kept_s))
  end
end

-- A pair of buckets: requests left, tokens left (nil where it is full, or there is none), the moment that is true of, and how
-- many resets there were. Four values and no list.

-- An entry of the ledger: a list of these. Spends are pairs: the key of a period, and how many resets it had seen. So are
-- rated: the keys of buckets that gave tokens. Parallel are the keys of the sets that the id is in.
local STATE, DEADLINE_MS, ADMITTED_MS, TOKENS_INPUT, TOKENS_OUTPUT, MICRO_USD = 1, 2, 3, 4, 5, 6
local SPENDS, RATED, PARALLEL, CLAIM, API_KEY_ID, ABOUT = 7, 8, 9, 10, 11, 12
local CLOSED = 'closed' -- what is left in its place

-- No request has more tokens, micro-dollars; so sums stay whole numbers, whatever somebody asks or a backend reports.
local AMOUNT_MAX = 1e12
local function amount(text) return min(tonumber(text), AMOUNT_MAX) end
