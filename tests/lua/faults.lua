-- Every way to be wrong, chosen by the offset of a read or by wrong=.
local wrong
function config(key, value)
    if key == "wrong" then wrong = value else error({}) end
end

local answers = { ["nil"] = nil, table = {}, negative = -1, fraction = 0.5, text = "x", huge = 1e300 }

function open()
    if wrong == "open" then return nil end
    return 1
end

function get_size()
    if wrong and wrong:match("^size") then return answers[wrong:sub(6)] end
    return 1 << 20
end

function pwrite() end
function can_fua() if wrong == "fua" then return 3 end return false end
function can_cache() if wrong == "cache" then return "often" end return true end

local function deep(n) if n == 0 then error("deep down") end return 1 + deep(n - 1) end
local function forever() return 1 + forever() end

local reads = {
    [0] = function(count) return string.rep("a", count + 10) end,
    function(count) return string.rep("a", count - 1) end,
    function() return nil end,
    function() return {} end,
    function() error("plain", 0) end,
    function() error({ code = 1 }) end,
    function() error(setmetatable({}, { __tostring = function() return "made of a table" end })) end,
    function() error() end,
    function() local x; return x.y end,
    function() return deep(5) end,
    function() return forever() end,
    function() nbdkit.set_error("ENOSPC"); error("no room") end,
    function() nbdkit.set_error(108); error("over") end,
    function() nbdkit.set_error("ENOSUCH") end,
    function() return nbdkit.parse_size("many") end,
    function() nbdkit.set_error("ENOMEM"); return string.rep("b", 512) end,
    function() return ("x"):rep(1 << 50) end,
    function() coroutine.yield() end,
    function() return tostring(assert(nil, "asserted")) end,
    function() return pcall(nbdkit.parse_size, "many") and "" or string.rep("c", 512) end,
    function() collectgarbage(); return string.rep("d", 512) end,
}

function pread(h, count, offset) return reads[offset // 512](count) end
