-- Keeps the answer of a request for those who send its idempotency key again, or lets the key go.
--
-- ARGV[2]  request id            ARGV[5]  status
-- ARGV[3]  claim                 ARGV[6]  headers
-- ARGV[4]  ms to keep it, or "0": let the key go; "-1": too large to keep, as many ms in ARGV[5]
-- ARGV[7]  body
--
-- Answers 1 when the claim was this request's and still running, else 0.

local claim = prefix .. 'claim:' .. ARGV[3]
local held = call('HMGET', claim, 'state', 'owner')
if held[1] ~= 'running' or held[2] ~= ARGV[2] then return 0 end
if ARGV[4] == '0' then
  call('DEL', claim)
elseif ARGV[4] == '-1' then
  call('HSET', claim, 'state', 'too_large')
  call('PEXPIRE', claim, ARGV[5])
else
  call('HSET', claim, 'state', 'done', 'status', ARGV[5], 'headers', ARGV[6], 'body', ARGV[7])
  call('PEXPIRE', claim, ARGV[4])
end
return 1
