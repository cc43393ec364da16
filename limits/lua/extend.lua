-- Puts off when an open request is overdue: somebody has seen that it still runs. Its slots are kept for it as long.
--
-- ARGV[2]  request id
-- ARGV[3]  numbers: ms until it is overdue, ms that a slot is kept
--
-- Answers 1 when the request is open, else 0.

local id, entry = ARGV[2], prefix .. 'entry:' .. ARGV[2]
local stored = call('GET', entry)
local opened = stored and stored ~= CLOSED and {unpacked(stored)}
if not opened or opened[STATE] ~= 'open' then return 0 end
local overdue_ms, slot_ms = unpacked(ARGV[3])
local _, now_ms = clock()
local deadline_ms = now_ms + overdue_ms
if deadline_ms > opened[DEADLINE_MS] then
  opened[DEADLINE_MS] = deadline_ms
  call('SET', entry, pack(unpack(opened)))
  call('ZADD', prefix .. 'open', deadline_ms, id)
end
for i = ENTRY_SIZE + 2 * (opened[PERIODS] + opened[RATED]) + 1, #opened do
  call('ZADD', opened[i], 'GT', now_ms + min(overdue_ms, slot_ms), id)
end
return 1
