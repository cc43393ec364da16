-- What is kept of an open request, for a record of one that nobody will tell of.
--
-- ARGV[2]  request id
--
-- Answers {admitted ms, input tokens, output tokens, micro-dollars, API key id, what the ledger is to know}, or nothing where the
-- request is not open.

local stored = call('GET', prefix .. 'entry:' .. ARGV[2])
local opened = stored and stored ~= CLOSED and {unpacked(stored)}
if not opened or opened[STATE] ~= 'open' then return {} end
return {
  opened[ADMITTED_MS], opened[TOKENS_INPUT], opened[TOKENS_OUTPUT], opened[MICRO_USD], opened[API_KEY_ID], opened[ABOUT],
}
