//! A disk of 1 GiB that is data, hole and zeroes in turn, a mebibyte each, and says so.
//!
//! ```console
//! $ cargo build --example extents
//! $ nbdkit target/debug/examples/libextents.so --run 'nbdinfo --map "$uri"' | head
//! ```

use nbdkit::*;

const SIZE: u64 = 1 << 30;
const STRIPE: u64 = 1 << 20;

struct Stripes;

/// What the stripe around `offset` is, and where it ends.
fn stripe(offset: u64) -> (ExtentType, u64) {
    let number = offset / STRIPE;
    let kind = match number % 3 {
        0 => ExtentType::Allocated,
        1 => ExtentType::HoleZero,
        _ => ExtentType::Zero,
    };
    (kind, (number + 1) * STRIPE)
}

impl Server for Stripes {
    fn name() -> &'static str {
        "extents"
    }

    fn open(_readonly: bool) -> Result<Box<dyn Server>> {
        Ok(Box::new(Stripes))
    }

    fn get_size(&self) -> Result<i64> {
        Ok(SIZE as i64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let (kind, end) = stripe(at);
            let (piece, after) = rest.split_at_mut(rest.len().min((end - at) as usize));
            piece.fill(if kind == ExtentType::Allocated { b'x' } else { 0 });
            at = end;
            rest = after;
        }
        Ok(())
    }

    fn extents(&self, count: u32, offset: u64, flags: Flags, extent_handle: &mut ExtentHandle) -> Result<()> {
        let end = offset + u64::from(count);
        let mut at = offset;
        while at < end {
            let (kind, next) = stripe(at);
            extent_handle.add(at, next - at, kind)?;
            if flags.contains(Flags::REQ_ONE) {
                break;
            }
            at = next;
        }
        Ok(())
    }
}

plugin!(Stripes { extents });
