-- Only what the page of 2019 has: every callback, with its booleans and strings.
local BLOCK = 4096
local size, blocks, rotational = 2 << 20, {}, false

local function update(count, offset, replacement)
    while count > 0 do
        local index, start = offset // BLOCK, offset % BLOCK
        local length = math.min(count, BLOCK - start)
        local old = blocks[index] or string.rep("\0", BLOCK)
        blocks[index] = old:sub(1, start) .. replacement(length) .. old:sub(start + length + 1)
        count, offset = count - length, offset + length
    end
end

function dump_plugin()
    print("page_block=" .. BLOCK)
end

function config(key, value)
    if key == "size" then
        size = tonumber(value)
    elseif key == "rotational" then
        rotational = value == "yes"
    else
        error("unknown parameter " .. key)
    end
end

function config_complete()
    assert(size and size > 0, "size must be positive")
end

function open(readonly)
    assert(type(readonly) == "boolean")
    return { readonly = readonly, reads = 0 }
end

function close(h)
    h.closed = true
end

function get_size(h)
    assert(not h.closed)
    return size
end

function can_write(h)
    return true
end

function can_flush(h)
    return true
end

function is_rotational(h)
    return rotational
end

function can_trim(h)
    return true
end

function pread(h, count, offset)
    h.reads = h.reads + 1
    if offset == 666 * 512 then error("bad sector") end
    local parts, at = {}, offset
    while at < offset + count do
        local index = at // BLOCK
        local stop = math.min((index + 1) * BLOCK, offset + count)
        local block = blocks[index] or string.rep("\0", BLOCK)
        parts[#parts + 1] = block:sub(at % BLOCK + 1, at % BLOCK + stop - at)
        at = stop
    end
    return table.concat(parts)
end

function pwrite(h, buf, offset)
    assert(type(buf) == "string")
    local done = 0
    update(#buf, offset, function(length)
        done = done + length
        return buf:sub(done - length + 1, done)
    end)
end

function flush(h)
    h.flushed = true
end

function trim(h, count, offset)
    update(count, offset, function(length) return string.rep("\0", length) end)
end

function zero(h, count, offset, may_trim)
    assert(type(may_trim) == "boolean")
    if not may_trim and offset == 7 * BLOCK then error("may_trim is false") end
    update(count, offset, function(length) return string.rep("\0", length) end)
end
