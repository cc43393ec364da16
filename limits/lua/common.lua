-- What every script shares. Source: docs/limits.md, which has the table of the keys.
--
-- KEYS[1]  names the hash slot: a key of the organisation. Every key that a script touches begins with ARGV[1].
-- ARGV[1]  prefix, "router:{<organisation>}:"
--
-- Money is micro-dollars, times are unix microseconds unless a name says otherwise. What only scripts read and every request
-- writes is MessagePack, and so are numbers in arguments: half the time of hashes and texts, and no digit is lost.
--
-- Most of a script's time is Lua's own. What is cheap: locals, arithmetic, `for i = 1, n`. What is not: tonumber, string.format,
-- tables that grow, and functions that use many locals of the script.

local call, pack, unpacked = redis.call, cmsgpack.pack, cmsgpack.unpack
local floor, min, max = math.floor, math.min, math.max
local prefix = ARGV[1]

-- Unix time of the server in seconds, milliseconds, microseconds.
local function clock()
  local time = call('TIME')
  local now_us = time[1] * 1000000 + time[2]
  return tonumber(time[1]), floor(now_us / 1000), now_us
end

-- Names of the day and the month that a moment lies in, and the seconds at which they end. UTC. Source of the civil date:
-- Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms".
local function periods_at(seconds)
  local days = floor(seconds / 86400)
  local z = days + 719468
  local era = floor(z / 146097)
  local of_era = z - era * 146097
  local year_of_era = floor((of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365)
  local of_year = of_era - (365 * year_of_era + floor(year_of_era / 4) - floor(year_of_era / 100))
  local shifted = floor((5 * of_year + 2) / 153)
  local day = of_year - floor((153 * shifted + 2) / 5) + 1
  local month = shifted < 10 and shifted + 3 or shifted - 9
  local year = year_of_era + era * 400 + (month <= 2 and 1 or 0)
  local last = 30 + (month + floor(month / 8)) % 2
  if month == 2 then last = (year % 4 == 0 and year % 100 ~= 0 or year % 400 == 0) and 29 or 28 end
  local date = string.format('%04d-%02d-%02d', year, month, day)
  return 'DAILY:' .. date, 'MONTHLY:' .. string.sub(date, 1, 7), (days + 1) * 86400, (days + last - day + 1) * 86400
end

-- What a subject has used of a period: values in this order. Credited is what resets have forgiven, resets how many there were.
local SPENT_TOKENS, SPENT_MICRO_USD, RESERVED_TOKENS, RESERVED_MICRO_USD = 1, 2, 3, 4
local CREDITED_TOKENS, CREDITED_MICRO_USD, RESETS = 5, 6, 7

local function use_of(stored)
  if stored then return {unpacked(stored)} end
  return {0, 0, 0, 0, 0, 0, 0}
end

-- It outlives its period, so that what comes late still finds it: a day for 15 days, a month for 101.
local function save_use(key, use, stored)
  if stored then
    call('SET', key, pack(unpack(use)), 'KEEPTTL')
  else
    call('SET', key, pack(unpack(use)), 'EX', string.find(key, ':MONTHLY:', 1, true) and 8726400 or 1296000)
  end
end

-- The buckets of a subject: requests left, tokens left (nil where full, or where there is none), the moment that was true, resets.

-- An entry of the ledger: values in this order. Then come, as many as two of them say, pairs of the key of a period and the
-- resets that it had seen, the same of buckets that gave tokens, and at last the keys of the sets that the id is in.
local STATE, DEADLINE_MS, ADMITTED_MS, TOKENS_INPUT, TOKENS_OUTPUT, MICRO_USD = 1, 2, 3, 4, 5, 6
local CLAIM, API_KEY_ID, ABOUT, PERIODS, RATED, ENTRY_SIZE = 7, 8, 9, 10, 11, 11
local CLOSED = 'closed' -- what is left in its place
