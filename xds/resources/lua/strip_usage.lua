-- Drops the usage event that ext_proc asked the backend for on the client's behalf, and ends a stream
-- that stopped without [DONE] with an error event, because a client takes a silent end for success.
-- Events pass as they come; only bytes after the last complete event are held until it is complete.
-- How many events with text have passed is told to the access log: a client that leaves leaves no usage.
-- Streams of /v1/responses are only counted: they have no [DONE], and say at their end what was used.

local ERROR_EVENT = '@ERROR_EVENT@'
-- Members whose text a model has made. Quotes within a text are escaped, so these cannot stand in one.
local TEXTS = {
  '"content"%s*:%s*"[^"]', '"text"%s*:%s*"[^"]', '"arguments"%s*:%s*"[^"]',
  '"reasoning_content"%s*:%s*"[^"]', '"reasoning"%s*:%s*"[^"]', '"refusal"%s*:%s*"[^"]',
}

local function is_injected_usage(event)
  return event:find('"choices"%s*:%s*%[%s*%]') ~= nil and event:find('"usage"%s*:%s*{') ~= nil
end

local function has_text(event)
  -- As most backends write it; a plain search takes a fraction of a pattern's time.
  local _, stop = event:find('"content":"', 1, true)
  if stop ~= nil and event:byte(stop + 1) ~= 34 then return true end
  for _, text in ipairs(TEXTS) do
    if event:find(text) ~= nil then return true end
  end
  return false
end

local function has_delta(event)
  return event:find('"delta"%s*:%s*"[^"]') ~= nil
end

function envoy_on_response(handle)
  local router = handle:streamInfo():dynamicMetadata():get("@NAMESPACE@")
  if router == nil or not router["@STREAM@"] then return end
  local headers = handle:headers()
  local content_type = headers:get("content-type") or ""
  if headers:get(":status") ~= "200" or not content_type:find("text/event-stream", 1, true) then return end
  local strip, counts, done = router["@STRIP_USAGE@"], has_text, false
  if router["@ENDPOINT@"] == "@RESPONSE@" then counts, done = has_delta, true end

  local held, told, events = "", 0, 0
  for chunk in handle:bodyChunks() do
    local size = chunk:length()
    if size == 0 then
      -- The stream ended cleanly.
      if not done then chunk:setBytes(held .. ERROR_EVENT) elseif held ~= "" then chunk:setBytes(held) end
    else
      local bytes = held .. chunk:getBytes(0, size)
      local out, from = {}, 1
      while true do
        local _, stop = bytes:find("\r?\n\r?\n", from)
        if stop == nil then break end
        local event = bytes:sub(from, stop)
        if event:find("^data:%s*%[DONE%]") then done = true end
        if not (strip and is_injected_usage(event)) then
          out[#out + 1] = event
          if counts(event) then events = events + 1 end
        end
        from = stop + 1
      end
      held = bytes:sub(from)
      chunk:setBytes(table.concat(out))
      if events > told then
        -- Asked for anew: wrappers do not outlive the wait for a chunk.
        handle:streamInfo():dynamicMetadata():set("@USAGE_NAMESPACE@", "@EVENTS@", events)
        told = events
      end
    end
  end
end
