//! The bytes that an expression stands for, without the bytes: fills, repeats and files stay what they are until they
//! are written to the disk, so a pattern of terabytes costs what its description does.

use std::{fs::File, os::unix::fs::FileExt, rc::Rc};

use anyhow::{Context as _, Result, ensure};
use nbdkit_core::Error;
use rustix::fs::{SeekFrom, seek};

/// What is no longer than this is kept as bytes. A page, so that holes stay holes.
const SMALL: u64 = 4096;
/// Most bytes written at once.
const CHUNK: u64 = 1 << 20;
/// How deep values may hold values: writing them is recursive.
const MAX_DEPTH: u16 = 250;

/// Where values are written to. Reads as zeroes before.
pub(super) trait Target {
    /// Writes `data` at `at`.
    ///
    /// # Errors
    /// Any.
    fn write(&mut self, data: &[u8], at: u64) -> Result<()>;

    /// Makes a range read as zeroes, a hole if possible.
    ///
    /// # Errors
    /// Any.
    fn zero(&mut self, length: u64, at: u64) -> Result<()>;
}

/// A number of bytes: a part of a node.
#[derive(Clone)]
pub(super) struct Value {
    node: Node,
    /// Where the part starts in the node.
    from: u64,
    size: u64,
    depth: u16,
}

#[derive(Clone)]
enum Node {
    Fill(u8),
    Bytes(Rc<[u8]>),
    File(Rc<File>),
    /// Values at offsets; the later ones lie over the earlier ones, zeroes between them.
    List(Rc<[(u64, Value)]>),
    Repeat(Rc<Value>),
}

/// Checks a size against the largest disk there is.
pub(super) fn size_in_range(size: Option<u64>) -> Result<u64> {
    size.filter(|size| i64::try_from(*size).is_ok())
        .context("data parameter: the disk would be larger than 2^63-1 bytes")
}

impl Value {
    /// `size` times the same byte.
    pub(super) fn fill(byte: u8, size: u64) -> Self {
        Value { node: Node::Fill(byte), from: 0, size, depth: 0 }
    }

    pub(super) fn bytes(bytes: &[u8]) -> Self {
        let size = bytes.len() as u64;
        match bytes.split_first() {
            None => Self::fill(0, 0),
            Some((first, rest)) if rest.iter().all(|byte| byte == first) => Self::fill(*first, size),
            _ => Value { node: Node::Bytes(bytes.into()), from: 0, size, depth: 0 },
        }
    }

    /// The part of a file from `from` on. It is read when the value is written.
    pub(super) fn file(file: File, from: u64, size: u64) -> Self {
        Value { node: Node::File(Rc::new(file)), from, size, depth: 0 }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// It `count` times.
    ///
    /// # Errors
    /// Longer than the largest disk, or nested too deeply.
    pub(super) fn repeat(self, count: u64) -> Result<Self> {
        let size = size_in_range(self.size.checked_mul(count))?;
        match self.node {
            _ if size == 0 => Ok(Self::fill(0, 0)),
            _ if count == 1 => Ok(self),
            Node::Fill(byte) => Ok(Self::fill(byte, size)),
            _ => {
                let depth = self.depth;
                Self::made(Node::Repeat(Rc::new(self)), size, depth)
            }
        }
    }

    /// Its bytes `from..to`, which are not past its end.
    pub(super) fn slice(&self, from: u64, to: u64) -> Self {
        if from >= to {
            return Self::fill(0, 0);
        }
        Value { from: self.from + from, size: to - from, ..self.clone() }
    }

    fn made(node: Node, size: u64, depth: u16) -> Result<Self> {
        ensure!(depth < MAX_DEPTH, "data parameter: values are nested more than {MAX_DEPTH} deep");
        let value = Value { node, from: 0, size, depth: depth + 1 };
        if size > SMALL { Ok(value) } else { Ok(Self::bytes(&value.to_bytes()?)) }
    }

    fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(self.size)?];
        self.write(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// Writes it at `at`.
    ///
    /// # Errors
    /// Those of the target and of its files.
    pub(super) fn write(&self, target: &mut dyn Target, at: u64) -> Result<()> {
        if self.size == 0 {
            return Ok(());
        }
        match &self.node {
            Node::Fill(0) => target.zero(self.size, at),
            Node::Fill(byte) => {
                let chunk = vec![*byte; self.size.min(CHUNK) as usize];
                write_over(target, &chunk, self.size, at)
            }
            Node::Bytes(bytes) => {
                target.write(&bytes[self.from as usize..(self.from + self.size) as usize], at)
            }
            Node::File(file) => self.write_file(file, target, at),
            Node::List(parts) => {
                target.zero(self.size, at)?;
                let end = self.from + self.size;
                for (offset, part) in parts.iter() {
                    let (from, to) = (self.from.max(*offset), end.min(offset + part.size));
                    if from < to {
                        part.slice(from - offset, to - offset).write(target, at + (from - self.from))?;
                    }
                }
                Ok(())
            }
            Node::Repeat(period) => self.write_repeated(period, target, at),
        }
    }

    fn write_repeated(&self, period: &Value, target: &mut dyn Target, at: u64) -> Result<()> {
        if period.size <= SMALL {
            let mut chunk = period.to_bytes()?;
            chunk.rotate_left((self.from % period.size) as usize);
            let times = (self.size.min(CHUNK) / period.size).max(1);
            return write_over(target, &chunk.repeat(times as usize), self.size, at);
        }
        let mut done = 0;
        while done < self.size {
            let from = (self.from + done) % period.size;
            let part = period.slice(from, period.size.min(from + self.size - done));
            part.write(target, at + done)?;
            done += part.size;
        }
        Ok(())
    }

    /// Holes of the file become holes of the target.
    fn write_file(&self, file: &File, target: &mut dyn Target, at: u64) -> Result<()> {
        let (mut here, end) = (self.from, self.from + self.size);
        let mut chunk = vec![0; self.size.min(CHUNK) as usize];
        while here < end {
            let data = match seek(file, SeekFrom::Data(here)) {
                Ok(data) => data.clamp(here, end),
                Err(rustix::io::Errno::NXIO) => end,
                // It cannot tell.
                Err(_) => here,
            };
            target.zero(data - here, at + (here - self.from))?;
            here = data;
            let hole = seek(file, SeekFrom::Hole(here)).map_or(end, |hole| hole.clamp(here, end));
            while here < hole {
                let part = &mut chunk[..(hole - here).min(CHUNK) as usize];
                file.read_exact_at(part, here)
                    .map_err(|e| Error::from(e).context("data parameter: cannot read a file"))?;
                target.write(part, at + (here - self.from))?;
                here += part.len() as u64;
            }
        }
        Ok(())
    }
}

/// Writes `size` bytes that are `chunk` again and again.
fn write_over(target: &mut dyn Target, chunk: &[u8], size: u64, at: u64) -> Result<()> {
    let mut done = 0;
    while done < size {
        let part = (chunk.len() as u64).min(size - done);
        target.write(&chunk[..part as usize], at + done)?;
        done += part;
    }
    Ok(())
}

/// Puts a list together, in the order of its items.
#[derive(Default)]
pub(super) struct Builder {
    parts: Vec<(u64, Value)>,
    /// Short values that follow each other, from there on.
    pending: Vec<u8>,
    pending_at: u64,
    offset: u64,
    size: u64,
}

impl Builder {
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Goes to an offset. The list is at least as long.
    pub(super) fn seek(&mut self, offset: u64) {
        self.offset = offset;
        self.size = self.size.max(offset);
    }

    /// Adds a value at the offset, which is then behind it.
    ///
    /// # Errors
    /// Past the end of the largest disk.
    pub(super) fn put(&mut self, value: Value) -> Result<()> {
        let end = size_in_range(self.offset.checked_add(value.size))?;
        let inline = value.size <= SMALL / 2 && matches!(value.node, Node::Fill(_) | Node::Bytes(_));
        let follows = self.pending_at + self.pending.len() as u64 == self.offset;
        if !inline || !follows {
            self.flush();
            self.pending_at = self.offset;
        }
        if inline {
            match &value.node {
                Node::Fill(byte) => {
                    self.pending.resize(self.pending.len() + value.size as usize, *byte);
                }
                _ => self.pending.extend(value.to_bytes()?),
            }
        } else {
            self.pending_at = end;
            self.parts.push((self.offset, value));
        }
        self.seek(end);
        Ok(())
    }

    fn flush(&mut self) {
        if !self.pending.is_empty() {
            self.parts.push((self.pending_at, Value::bytes(&self.pending)));
            self.pending.clear();
        }
    }

    /// The list as a value.
    ///
    /// # Errors
    /// Nested too deeply.
    pub(super) fn finish(mut self) -> Result<Value> {
        self.flush();
        match self.parts.as_slice() {
            [] => Ok(Value::fill(0, self.size)),
            [(0, only)] if only.size == self.size => Ok(only.clone()),
            parts => {
                let depth = parts.iter().map(|(_, part)| part.depth).max().unwrap_or_default();
                Value::made(Node::List(self.parts.into()), self.size, depth)
            }
        }
    }
}

/// In memory, for what is small.
impl Target for Vec<u8> {
    fn write(&mut self, data: &[u8], at: u64) -> Result<()> {
        self[at as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn zero(&mut self, length: u64, at: u64) -> Result<()> {
        self[at as usize..][..length as usize].fill(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    /// How to make a value, and the bytes that it then has.
    #[derive(Clone, Debug)]
    enum Recipe {
        Bytes(Vec<u8>),
        Fill(u8, u64),
        File(Vec<u8>),
        List(Vec<(u64, Recipe)>),
        Repeat(Box<Recipe>, u64),
        Slice(Box<Recipe>, u8, u8),
    }

    impl Recipe {
        fn make(&self) -> (Value, Vec<u8>) {
            match self {
                Recipe::Bytes(bytes) => (Value::bytes(bytes), bytes.clone()),
                Recipe::Fill(byte, size) => (Value::fill(*byte, *size), vec![*byte; *size as usize]),
                Recipe::File(bytes) => {
                    let mut file = tempfile::tempfile().unwrap();
                    file.write_all(bytes).unwrap();
                    (Value::file(file, 0, bytes.len() as u64), bytes.clone())
                }
                Recipe::List(parts) => {
                    let (mut builder, mut all) = (Builder::default(), Vec::<u8>::new());
                    for (gap, part) in parts {
                        // Some overlap what was there before.
                        builder.seek((builder.offset() + gap).saturating_sub(50));
                        let at = builder.offset() as usize;
                        let (value, bytes) = part.make();
                        builder.put(value).unwrap();
                        all.resize(all.len().max(at + bytes.len()), 0);
                        all[at..at + bytes.len()].copy_from_slice(&bytes);
                    }
                    (builder.finish().unwrap(), all)
                }
                Recipe::Repeat(of, count) => {
                    let (value, bytes) = of.make();
                    (value.repeat(*count).unwrap(), bytes.repeat(*count as usize))
                }
                Recipe::Slice(of, from, to) => {
                    let (value, bytes) = of.make();
                    let place = |part: u8| bytes.len() * usize::from(part) / 255;
                    let (from, to) = (place(*from.min(to)), place(*from.max(to)));
                    (value.slice(from as u64, to as u64), bytes[from..to].into())
                }
            }
        }
    }

    fn recipe() -> impl Strategy<Value = Recipe> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..5000);
        let leaf = prop_oneof![
            bytes().prop_map(Recipe::Bytes),
            (any::<u8>(), 0_u64..9000).prop_map(|(byte, size)| Recipe::Fill(byte, size)),
            bytes().prop_map(Recipe::File),
        ];
        leaf.prop_recursive(4, 20, 4, |inner| {
            prop_oneof![
                prop::collection::vec((0_u64..200, inner.clone()), 0..4).prop_map(Recipe::List),
                (inner.clone(), 0_u64..4).prop_map(|(of, count)| Recipe::Repeat(Box::new(of), count)),
                (inner, any::<u8>(), any::<u8>()).prop_map(|(of, a, b)| Recipe::Slice(Box::new(of), a, b)),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn values_are_their_bytes(recipe in recipe()) {
            let (value, bytes) = recipe.make();
            prop_assert_eq!(value.size(), bytes.len() as u64);
            // What was there before does not show through.
            let mut target = vec![0xee; bytes.len() + 2];
            value.write(&mut target, 1).unwrap();
            prop_assert!(target[1..=bytes.len()] == bytes && target[0] == 0xee && target[bytes.len() + 1] == 0xee);
        }
    }

    #[test]
    fn sizes_stay_on_the_largest_disk() {
        let largest = i64::MAX as u64;
        assert_eq!(Value::fill(1, 1).repeat(largest).unwrap().size(), largest);
        assert!(Value::fill(1, 2).repeat(largest / 2 + 1).is_err());
        let mut builder = Builder::default();
        builder.seek(largest);
        builder.put(Value::fill(0, 0)).unwrap();
        assert!(builder.put(Value::fill(0, 1)).is_err());
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth| {
            (0..depth).try_fold(Value::bytes(&[1, 2]).repeat(SMALL)?, |value, _| {
                let mut builder = Builder::default();
                builder.put(value)?;
                builder.put(Value::bytes(&[1]))?;
                builder.finish()
            })
        };
        assert!(nested(MAX_DEPTH - 1).is_ok() && nested(MAX_DEPTH).is_err());
    }
}
