-- Puts the backend's own name for the model into the body, touching no other byte.
-- ext_proc has said where the JSON string stands; the route says what replaces it.

function envoy_on_request(handle)
  local span = handle:headers():get("@MODEL_SPAN@")
  if span == nil then return end
  local offset, length = span:match("^(%d+):(%d+)$")
  local body = handle:body()
  local size = body:length()
  offset, length = tonumber(offset), tonumber(length)
  local tail = offset + length
  handle:headers():remove("content-length")
  local renamed = body:getBytes(0, offset) .. handle:filterContext():get("model") .. body:getBytes(tail, size - tail)
  handle:headers():replace("content-length", tostring(body:setBytes(renamed)))
end
