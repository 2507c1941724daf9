-- A disk of any size, up to exabytes, with a line of text at the beginning of each GiB and holes between.
--
--   nbdkit lua sparse.lua size=8T --run 'nbdinfo --map "$uri" | head'
local GIB, BLOCK = 1 << 30, 4096
local size = 1 << 40

function config(key, value)
    if key ~= "size" then error("unknown parameter " .. key, 0) end
    size = nbdkit.parse_size(value)
end

function open(readonly) return {} end
function get_size(h) return size end
function can_multi_conn(h) return true end

local function line(index)
    local text = string.format("This is GiB %d of %d.\n", index, (size + GIB - 1) // GIB)
    return text .. string.rep("\0", BLOCK - #text)
end

-- Calls visit(data or nil, number of bytes, offset) for each piece of the range that is all data or all hole.
local function each(offset, count, visit)
    local stop = math.min(offset + count, size)
    while offset < stop do
        local index, at = offset // GIB, offset % GIB
        local is_data = at < BLOCK
        local length = math.min((is_data and BLOCK or GIB) - at, stop - offset)
        visit(is_data and line(index):sub(at + 1, at + length), length, offset)
        offset = offset + length
    end
end

function pread(h, count, offset)
    local parts = {}
    each(offset, count, function(data, length)
        parts[#parts + 1] = data or string.rep("\0", length)
    end)
    return table.concat(parts)
end

function extents(h, count, offset, req_one)
    local list = {}
    each(offset, req_one and 1 or count, function(data, length, at)
        list[#list + 1] = { offset = at, length = length, hole = not data, zero = not data }
    end)
    return list
end
