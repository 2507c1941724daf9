-- A disk that is a picture of the Mandelbrot set, in the format PGM. Each point is computed when it is read.
--
--   nbdkit lua fractal.lua width=1920 height=1080 --run 'nbdcopy "$uri" mandelbrot.pgm'
--   nbdkit-mount lua fractal.lua /mnt/x && cp /mnt/x/nbd mandelbrot.pgm
local width, height, depth = 640, 480, 255
local header

local function number(key, value)
    local answer = tonumber(value)
    if not answer or answer < 1 or answer > 65536 then error(key .. " must be from 1 to 65536", 0) end
    return math.tointeger(answer) or error(key .. " must be a whole number", 0)
end

function config(key, value)
    if key == "width" then
        width = number(key, value)
    elseif key == "height" then
        height = number(key, value)
    else
        error("unknown parameter " .. key, 0)
    end
end

function config_complete()
    header = string.format("P5\n%d %d\n255\n", width, height)
end

function open(readonly) return {} end
function get_size(h) return #header + width * height end
function can_multi_conn(h) return true end

-- How fast the series runs away at a point of the picture: the brighter, the faster; inside the set it is black.
local function brightness(column, row)
    local scale = 3.0 / math.min(width, height)
    local cr, ci = (column - width / 2) * scale - 0.6, (row - height / 2) * scale
    local r, i = 0.0, 0.0
    for step = 1, depth do
        r, i = r * r - i * i + cr, 2 * r * i + ci
        if r * r + i * i > 4 then return math.max(1, 256 - step) end
    end
    return 0
end

function pread(h, count, offset)
    local parts = { header:sub(offset + 1, offset + count) }
    for at = math.max(offset, #header), offset + count - 1 do
        local point = at - #header
        parts[#parts + 1] = string.char(brightness(point % width, point // width))
    end
    return table.concat(parts)
end
