//! Statistics of a mount, read by another process: an ioctl(2) on its root.
//!
//! An extended attribute would be simpler to read. But a file system that answers for one is asked for
//! `security.capability` before every write, and that costs more than the counting does.

use nbdkit_core::{
    Chain,
    stats::{OPS, Totals},
};
use serde_json::{Value, json};

/// Size of the answer's buffer in bytes: the most that the number of an ioctl can tell.
pub const SIZE: usize = (1 << 14) - 1;

/// Type of the ioctl's number.
const TYPE: u32 = 0xD7;
/// `_IOC_READ`.
const READ: u32 = 2;

/// The ioctl for what was counted in one place: 0 for all requests, then the layers, the outermost first. Its argument
/// points to [`SIZE`] bytes, which take a JSON object that ends at the first zero byte. `ENOTTY` says that nothing is
/// counted, `ENODATA` that there is no such layer.
pub const fn request(place: u8) -> u32 {
    (READ << 30) | ((SIZE as u32) << 16) | (TYPE << 8) | place as u32
}

/// Answers an ioctl. None: it is another one, or nothing is counted.
pub(crate) fn answer(chain: &Chain, command: u32) -> Option<Result<Vec<u8>, fuser::Errno>> {
    let place = command as u8;
    if command != request(place) {
        return None;
    }
    let stats = chain.stats()?;
    let (name, totals) = match place.checked_sub(1) {
        None => ("requests", stats.total()),
        Some(layer) => match stats.of_layer(layer.into()) {
            Some(layer) => layer,
            None => return Some(Err(fuser::Errno::ENODATA)),
        },
    };
    let object = encode(name, stats.age().as_nanos() as u64, &totals);
    Some(if object.len() < SIZE { Ok(object) } else { Err(fuser::Errno::E2BIG) })
}

/// All that a chain has counted, for [`decode_document`]: the places in the order of the ioctl.
pub fn document(chain: &Chain) -> Option<String> {
    let stats = chain.stats()?;
    let age = stats.age().as_nanos() as u64;
    let layers = (0..).map_while(|layer| stats.of_layer(layer));
    let places = [("requests", stats.total())].into_iter().chain(layers);
    let places = places.map(|(name, totals)| encode(name, age, &totals)).collect::<Vec<_>>();
    Some(format!("[{}]\n", String::from_utf8(places.join(&b',')).ok()?))
}

/// Reads a document back, as [`decode`] reads the places in it.
pub fn decode_document(document: &[u8]) -> Option<Vec<(String, u64, Totals)>> {
    let document: Value = serde_json::from_slice(document).ok()?;
    document.as_array()?.iter().map(|place| decode(place.to_string().as_bytes())).collect()
}

fn encode(name: &str, age: u64, totals: &Totals) -> Vec<u8> {
    let ops = OPS.iter().zip(&totals.ops).filter(|(_, op)| op.count > 0).map(|(kind, op)| {
        let steps: Vec<(usize, u64)> = op.latency.steps().collect();
        let value = json!({
            "count": op.count,
            "bytes": op.bytes,
            "errors": op.errors,
            "steps": steps,
        });
        (format!("{kind:?}").to_lowercase(), value)
    });
    let ops: serde_json::Map<String, Value> = ops.collect();
    json!({ "name": name, "age_ns": age, "at_once": totals.at_once, "ops": ops }).to_string().into_bytes()
}

/// Reads an answer back: the name of the place, for how many nanoseconds it has been counting, and what it has counted.
/// None: it is no such answer.
pub fn decode(answer: &[u8]) -> Option<(String, u64, Totals)> {
    let end = answer.iter().position(|b| *b == 0).unwrap_or(answer.len());
    let object: Value = serde_json::from_slice(&answer[..end]).ok()?;
    let mut totals = Totals { at_once: object["at_once"].as_u64()?, ..Totals::default() };
    for (kind, op) in OPS.iter().zip(&mut totals.ops) {
        let Some(counted) = object["ops"].get(format!("{kind:?}").to_lowercase()) else { continue };
        op.count = counted["count"].as_u64()?;
        op.bytes = counted["bytes"].as_u64()?;
        op.errors = counted["errors"].as_u64()?;
        for step in counted["steps"].as_array()? {
            op.latency.add(usize::try_from(step[0].as_u64()?).ok()?, step[1].as_u64()?);
        }
    }
    Some((object["name"].as_str()?.to_owned(), object["age_ns"].as_u64()?, totals))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbdkit_core::Op;

    #[test]
    fn answers_come_back() {
        let mut totals = Totals { at_once: 3, ..Totals::default() };
        let read = &mut totals.ops[Op::Read as usize];
        (read.count, read.bytes, read.errors) = (48, 4096, u64::MAX);
        read.latency.add(7, 5);
        read.latency.add(123, 1);
        let mut buffer = encode("cow", 99, &totals);
        buffer.resize(SIZE, 0);
        assert_eq!(decode(&buffer), Some(("cow".into(), 99, totals)));
        assert_eq!(decode(b"{}"), None);
        assert_eq!(decode(b""), None);
    }

    #[test]
    fn a_busy_layer_fits() {
        let mut totals = Totals::default();
        for op in &mut totals.ops {
            (op.count, op.bytes, op.errors) = (u64::MAX, u64::MAX, u64::MAX);
            // Nobody has requests that take all of 64 nanoseconds and three minutes: half of the steps is plenty.
            (0..62).for_each(|step| op.latency.add(step, 1 << 50));
        }
        assert!(encode("a-filter-with-a-long-name", u64::MAX, &totals).len() < SIZE);
    }
}
