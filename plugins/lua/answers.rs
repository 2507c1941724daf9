//! What a script's functions answer, as the server wants it. Whatever else they answer is an error that names the
//! function and what it returned.

use mlua::{Table, Value};
use nbdkit::{BlockSize, CacheFlags, ExportHandle, ExtentHandle, ExtentType, FuaFlags, Result, ThreadModel};

use crate::script::Script;

/// As Lua sees it: nil and false are no, everything else is yes.
pub(crate) fn boolean(answer: &Value) -> bool {
    !matches!(answer, Value::Nil | Value::Boolean(false))
}

/// A whole number; one with a fraction of zero is one too.
fn whole(value: &Value) -> Option<i64> {
    match *value {
        Value::Integer(number) => Some(number),
        // 2^63 is the first that does not fit.
        Value::Number(number) if number.fract() == 0.0 && number.abs() < 9_223_372_036_854_775_808.0 => {
            Some(number as i64)
        }
        _ => None,
    }
}

/// The value in words, for messages.
fn shown(value: &Value) -> String {
    match value {
        Value::Nil => "nil".to_owned(),
        Value::Boolean(value) => value.to_string(),
        Value::Integer(number) => number.to_string(),
        // Debug, since Display would write 1e300 with all its zeroes.
        Value::Number(number) => format!("{number:?}"),
        Value::String(text) => format!("the string '{}'", text.to_string_lossy()),
        other => format!("a {}", other.type_name()),
    }
}

pub(crate) fn size(script: &Script, answer: &Value) -> Result<i64> {
    whole(answer).filter(|&size| size >= 0).ok_or_else(|| {
        script.wrong("get_size", format!("the size must be a number of bytes, not {}", shown(answer)))
    })
}

/// A string that need not be there.
pub(crate) fn text(script: &Script, method: &str, answer: &Value) -> Result<Option<String>> {
    match answer {
        Value::Nil => Ok(None),
        Value::String(text) => match text.to_str() {
            Ok(text) => Ok(Some(text.to_owned())),
            Err(_) => Err(script.wrong(method, "the string is not UTF-8")),
        },
        other => Err(script.wrong(method, format!("must return a string or nil, not {}", shown(other)))),
    }
}

/// One of a few numbers.
fn one_of<T: Copy>(script: &Script, method: &str, answer: &Value, values: &[T], names: &str) -> Result<T> {
    let index = whole(answer).and_then(|number| usize::try_from(number).ok());
    index
        .and_then(|index| values.get(index))
        .copied()
        .ok_or_else(|| script.wrong(method, format!("must return one of {names}, not {}", shown(answer))))
}

pub(crate) fn thread_model(script: &Script, answer: Value) -> Result<ThreadModel> {
    use ThreadModel::{Parallel, SerializeAllRequests, SerializeConnections, SerializeRequests};
    let models = [SerializeConnections, SerializeAllRequests, SerializeRequests, Parallel];
    one_of(script, "thread_model", &answer, &models, "nbdkit.THREAD_MODEL_*")
}

/// Also yes, which is native, or no.
pub(crate) fn fua(script: &Script, answer: &Value) -> Result<FuaFlags> {
    match answer {
        Value::Boolean(true) => Ok(FuaFlags::Native),
        Value::Boolean(false) | Value::Nil => Ok(FuaFlags::None),
        _ => {
            let values = [FuaFlags::None, FuaFlags::Emulate, FuaFlags::Native];
            one_of(script, "can_fua", answer, &values, "nbdkit.FUA_*, true and false")
        }
    }
}

/// Also yes, which is native, or no.
pub(crate) fn cache(script: &Script, answer: &Value) -> Result<CacheFlags> {
    match answer {
        Value::Boolean(true) => Ok(CacheFlags::Native),
        Value::Boolean(false) | Value::Nil => Ok(CacheFlags::None),
        _ => {
            let values = [CacheFlags::None, CacheFlags::Emulate, CacheFlags::Native];
            one_of(script, "can_cache", answer, &values, "nbdkit.CACHE_*, true and false")
        }
    }
}

pub(crate) fn block_size(script: &Script, answers: &[Value; 3]) -> Result<BlockSize> {
    let [minimum, preferred, maximum] = answers.each_ref().map(|answer| {
        let number = whole(answer).and_then(|number| u32::try_from(number).ok());
        number.ok_or_else(|| {
            let text = format!("must return minimum, preferred and maximum in bytes, not {}", shown(answer));
            script.wrong("block_size", text)
        })
    });
    Ok(BlockSize { minimum: minimum?, preferred: preferred?, maximum: maximum? })
}

/// Copies what pread returned. More than was asked for is allowed.
pub(crate) fn data(script: &Script, answer: &Value, buffer: &mut [u8]) -> Result<()> {
    let Value::String(text) = answer else {
        return Err(script.wrong("pread", format!("must return a string, not {}", shown(answer))));
    };
    let bytes = text.as_bytes();
    let Some(bytes) = bytes.get(..buffer.len()) else {
        let (got, wanted) = (bytes.len(), buffer.len());
        return Err(script.wrong("pread", format!("returned {got} bytes where {wanted} were asked for")));
    };
    buffer.copy_from_slice(bytes);
    Ok(())
}

/// A list of names, or of tables with a name and perhaps a description.
pub(crate) fn exports(script: &Script, answer: &Value, exports: &mut ExportHandle) -> Result<()> {
    let method = "list_exports";
    let wrong = |value: &Value| {
        let text = format!("must return a list of names or of {{name=, description=}}, not {}", shown(value));
        script.wrong(method, text)
    };
    let Value::Table(list) = answer else { return Err(wrong(answer)) };
    for entry in list.sequence_values::<Value>() {
        let entry = entry.map_err(|e| script.wrong(method, e))?;
        let (name, description) = match &entry {
            Value::Table(fields) => {
                (field(script, method, fields, "name")?, field(script, method, fields, "description")?)
            }
            name => (name.clone(), Value::Nil),
        };
        if !name.is_string() {
            return Err(wrong(&name));
        }
        let name = text(script, method, &name)?.unwrap_or_default();
        exports.add(&name, text(script, method, &description)?.as_deref())?;
    }
    Ok(())
}

/// A list of tables with an offset, a length and perhaps hole and zero.
pub(crate) fn extents(script: &Script, answer: &Value, extents: &mut ExtentHandle) -> Result<()> {
    let method = "extents";
    let wrong = |value: &Value| {
        let text = format!("must return a list of {{offset=, length=, hole=, zero=}}, not {}", shown(value));
        script.wrong(method, text)
    };
    let Value::Table(list) = answer else { return Err(wrong(answer)) };
    for entry in list.sequence_values::<Value>() {
        let entry = entry.map_err(|e| script.wrong(method, e))?;
        let Value::Table(fields) = &entry else { return Err(wrong(&entry)) };
        let number = |name| {
            let value = field(script, method, fields, name)?;
            let number = whole(&value).and_then(|number| u64::try_from(number).ok());
            number.ok_or_else(|| {
                script.wrong(method, format!("{name} must be a number of bytes, not {}", shown(&value)))
            })
        };
        let flag = |name| field(script, method, fields, name).map(|value| boolean(&value));
        let kind = match (flag("hole")?, flag("zero")?) {
            (false, false) => ExtentType::Allocated,
            (true, false) => ExtentType::Hole,
            (false, true) => ExtentType::Zero,
            (true, true) => ExtentType::HoleZero,
        };
        extents.add(number("offset")?, number("length")?, kind)?;
    }
    Ok(())
}

fn field(script: &Script, method: &str, fields: &Table, name: &str) -> Result<Value> {
    fields.get(name).map_err(|e| script.wrong(method, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers() {
        assert_eq!(whole(&Value::Integer(5)), Some(5));
        assert_eq!(whole(&Value::Number(1e9)), Some(1_000_000_000));
        for number in [0.5, f64::NAN, f64::INFINITY, 1e19, -1e19] {
            assert_eq!(whole(&Value::Number(number)), None, "{number}");
        }
        assert_eq!(whole(&Value::Boolean(true)), None);
    }

    #[test]
    fn truth_is_lua_s() {
        assert!(boolean(&Value::Integer(0)) && boolean(&Value::Boolean(true)));
        assert!(!boolean(&Value::Nil) && !boolean(&Value::Boolean(false)));
    }
}
