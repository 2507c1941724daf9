#!/usr/sbin/nbdkit lua
-- What the page does not have. Says in the file log= what is called, with the arguments that matter.
local log
local zero_fails

local function say(...)
    local words = table.pack(...)
    for i = 1, words.n do words[i] = tostring(words[i]) end
    log:write(table.concat(words, " "), "\n")
    log:flush()
end

function config(key, value)
    if key == "log" then
        log = assert(io.open(nbdkit.absolute_path(value), "a"))
    elseif key == "zero" then
        zero_fails = value
    else
        error("unknown parameter " .. key)
    end
end

function config_complete()
    if not log then error("log= is missing", 0) end
end

function thread_model() return nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS end

function get_ready() say("get_ready") end
function after_fork() say("after_fork") end
function preconnect(readonly) say("preconnect", readonly) end
function cleanup() say("cleanup") end
function unload() say("unload") end

function list_exports(readonly, is_tls)
    say("list_exports", readonly, is_tls)
    return { "plain", { name = "described", description = "with words" } }
end

function default_export(readonly, is_tls) return "plain" end

function open(readonly)
    local name = nbdkit.export_name()
    say("open", readonly, name, nbdkit.is_tls())
    if name == "forbidden" then
        nbdkit.set_error("EPERM")
        error("not for you", 0)
    end
    return name
end

function close(h) say("close", h) end
function export_description(h) if h == "described" then return "with words" end end
function get_size(h) return 1e6 // 4096 * 4096 end
function block_size(h) return 512, 4096, 0xffffffff end
function can_write(h) return h ~= "readonly" end
function can_flush(h) return true end
function is_rotational(h) return h == "described" end
function can_trim(h) return true end
function can_zero(h) return true end
function can_fast_zero(h) return true end
function can_extents(h) return true end
function can_fua(h) return nbdkit.FUA_NATIVE end
function can_multi_conn(h) return true end
function can_cache(h) return nbdkit.CACHE_NATIVE end

function pread(h, count, offset) return string.rep("r", count) end
function pwrite(h, buf, offset, fua) say("pwrite", #buf, offset, fua) end
function flush(h) say("flush") end
function trim(h, count, offset, fua) say("trim", count, offset, fua) end
function cache(h, count, offset) say("cache", count, offset) end

function zero(h, count, offset, may_trim, fua, fast)
    say("zero", count, offset, may_trim, fua, fast)
    if zero_fails then
        nbdkit.set_error(zero_fails)
        error("zero fails")
    end
end

function extents(h, count, offset, req_one)
    say("extents", count, offset, req_one)
    return {
        { offset = 0, length = 4096 },
        { offset = 4096, length = 8192, hole = true, zero = true },
        { offset = 12288, length = 4096, zero = true },
        { offset = 16384, length = get_size(h) - 16384 },
    }
end
