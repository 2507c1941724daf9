-- A RAM disk: blocks in a table, those that were never written are not there.
--
--   nbdkit lua ramdisk.lua size=100M
local BLOCK = 4096
local ZEROES = string.rep("\0", BLOCK)
local blocks, size = {}, nil

function config(key, value)
    if key ~= "size" then error("unknown parameter " .. key, 0) end
    size = nbdkit.parse_size(value)
end

function config_complete()
    if not size then error("size= is missing: say how large the disk is", 0) end
end

function open(readonly) return {} end
function get_size(h) return size end
function block_size(h) return 1, BLOCK, 0xffffffff end
function can_multi_conn(h) return true end
function flush(h) end

-- Calls visit(index of the block, first byte in it, number of bytes) for each block of the range.
local function each(offset, count, visit)
    local stop = offset + count
    while offset < stop do
        local start = offset % BLOCK
        local length = math.min(BLOCK - start, stop - offset)
        visit(offset // BLOCK, start, length)
        offset = offset + length
    end
end

function pread(h, count, offset)
    local parts = {}
    each(offset, count, function(index, start, length)
        parts[#parts + 1] = (blocks[index] or ZEROES):sub(start + 1, start + length)
    end)
    return table.concat(parts)
end

local function write(index, start, data)
    if #data < BLOCK then
        local old = blocks[index] or ZEROES
        data = old:sub(1, start) .. data .. old:sub(start + #data + 1)
    end
    blocks[index] = data
end

function pwrite(h, buf, offset)
    local done = 0
    each(offset, #buf, function(index, start, length)
        write(index, start, buf:sub(done + 1, done + length))
        done = done + length
    end)
end

function zero(h, count, offset, may_trim)
    each(offset, count, function(index, start, length)
        if length == BLOCK then
            blocks[index] = nil
        elseif blocks[index] then
            write(index, start, string.rep("\0", length))
        end
    end)
end

trim = zero
