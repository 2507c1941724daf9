//! A disk concatenated from files, fixed sectors and padding: the handle of the split and partitioning plugins.

use std::{ops::Range, sync::Arc};

use nbdkit_common::{Piece, Regions};
use nbdkit_core::{Call, Caps, Data, Errno, Error, Extents, Flags, Handle, Loan, Outcome, Request, Result};

use crate::{block_file::BlockFile, lock::Lock};

/// What a region of the disk is made of.
pub(crate) enum Segment {
    /// The start of a file.
    File(BlockFile),
    /// Bytes that no client can change.
    Fixed(Vec<u8>),
    /// Zeroes that no client can change.
    Padding,
}

/// An open disk. Requests are cut at the borders of its segments.
pub(crate) struct Concat {
    segments: Arc<Regions<Segment>>,
    writable: bool,
    fast_zero: bool,
    _locks: Vec<Lock>,
}

impl Concat {
    pub(crate) fn new(segments: Arc<Regions<Segment>>) -> Self {
        let all = |is: fn(&BlockFile) -> bool| files(&segments).all(is);
        let (writable, fast_zero) = (all(BlockFile::is_writable), all(BlockFile::zeroes_fast));
        Concat { segments, writable, fast_zero, _locks: Vec::new() }
    }

    /// Keeps the files locked while it is open.
    pub(crate) fn keeping(self, locks: Vec<Lock>) -> Self {
        Concat { _locks: locks, ..self }
    }

    /// Refuses a change of what cannot change, before anything else is changed. `data` is None for zeroes.
    fn check_fixed(&self, data: Option<&[u8]>, length: u64, offset: u64) -> Result<()> {
        for piece in self.segments.pieces(offset, length) {
            let new = data.map(|data| &data[in_request(&piece)]);
            match &piece.region.kind {
                Segment::File(_) => {}
                Segment::Fixed(bytes) if same(new, &bytes[in_region(&piece)]) => {}
                Segment::Fixed(_) => {
                    return Err(Error::new(
                        Errno::EIO,
                        "attempt to change the partition table of a virtual disk",
                    ));
                }
                Segment::Padding if new.is_none_or(is_zero) => {}
                Segment::Padding => {
                    return Err(Error::new(
                        Errno::EIO,
                        "attempt to write data to the padding between partitions",
                    ));
                }
            }
        }
        Ok(())
    }

    /// The file that holds all of a range.
    fn lend(&self, call: &Call) -> Option<Loan<'_>> {
        let mut pieces = self.segments.pieces(call.offset, call.length);
        let (piece, rest) = (pieces.next()?, pieces.next());
        match &piece.region.kind {
            Segment::File(file) if rest.is_none() => Some(Loan { fd: file.fd(), offset: piece.within }),
            _ => None,
        }
    }

    /// Does something to the files in a range, and makes it durable where FUA is set.
    fn change(
        &self,
        length: u64,
        offset: u64,
        flags: Flags,
        mut change: impl FnMut(&BlockFile, &Piece<'_, Segment>) -> Result<()>,
    ) -> Result<()> {
        for piece in self.segments.pieces(offset, length) {
            if let Segment::File(file) = &piece.region.kind {
                change(file, &piece)?;
                if flags.contains(Flags::FUA) {
                    file.sync()?;
                }
            }
        }
        Ok(())
    }

    fn read(
        &self,
        buf: &mut [u8],
        offset: u64,
        mut read: impl FnMut(&BlockFile, &mut [u8], u64) -> Result<bool>,
    ) -> Result<bool> {
        for piece in self.segments.pieces(offset, buf.len() as u64) {
            let target = &mut buf[in_request(&piece)];
            match &piece.region.kind {
                Segment::File(file) => {
                    if !read(file, target, piece.within)? {
                        return Ok(false);
                    }
                }
                Segment::Fixed(bytes) => target.copy_from_slice(&bytes[in_region(&piece)]),
                Segment::Padding => target.fill(0),
            }
        }
        Ok(true)
    }
}

fn files(segments: &Regions<Segment>) -> impl Iterator<Item = &BlockFile> {
    segments.as_slice().iter().filter_map(|region| match &region.kind {
        Segment::File(file) => Some(file),
        _ => None,
    })
}

/// The piece as a range of the request's buffer.
fn in_request(piece: &Piece<'_, Segment>) -> Range<usize> {
    piece.at as usize..(piece.at + piece.length) as usize
}

/// The piece as a range of the region's bytes.
fn in_region(piece: &Piece<'_, Segment>) -> Range<usize> {
    piece.within as usize..(piece.within + piece.length) as usize
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

fn same(new: Option<&[u8]>, bytes: &[u8]) -> bool {
    new.map_or_else(|| is_zero(bytes), |new| new == bytes)
}

impl Handle for Concat {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::native(self.segments.size())
            .with_write(self.writable)
            .with_fast_zero(self.fast_zero)
            .with_skip_holes(files(&self.segments).all(BlockFile::is_near)))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read(buf, offset, |file, buf, at| file.read(buf, at).map(|()| true)).map(drop)
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let length = buf.len() as u64;
        self.check_fixed(Some(buf), length, offset)?;
        self.change(length, offset, flags, |file, piece| file.write(&buf[in_request(piece)], piece.within))
    }

    fn flush(&self) -> Result<()> {
        files(&self.segments).try_for_each(BlockFile::sync)
    }

    /// What cannot change stays: a trim promises nothing.
    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.change(length, offset, flags, |file, piece| file.discard(piece.length, piece.within))
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.check_fixed(None, length, offset)?;
        let may_trim = flags.contains(Flags::MAY_TRIM);
        self.change(length, offset, flags, |file, piece| file.zero(piece.length, piece.within, may_trim))
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        for piece in self.segments.pieces(offset, length) {
            let at = offset + piece.at;
            match &piece.region.kind {
                Segment::File(file) => file.extents(piece.length, piece.within, flags, at, extents)?,
                Segment::Fixed(_) => extents.add_data(at, piece.length)?,
                Segment::Padding => extents.add(at, piece.length, true, true)?,
            }
            // Files may stop early, and then what follows would leave a gap.
            if flags.contains(Flags::REQ_ONE) || extents.covered_to() < at + piece.length {
                break;
            }
        }
        Ok(())
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        self.change(length, offset, Flags::empty(), |file, piece| {
            file.advise_will_need(piece.length, piece.within)
        })
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if request.may_lend() {
            return self.lend(request.call()).map_or(Outcome::NeedsThread, Outcome::Lent);
        }
        if request.may_wait() {
            return request.run(self);
        }
        let offset = request.offset();
        match request.data() {
            Data::Read(buf) => match self.read(buf, offset, BlockFile::read_nowait) {
                Ok(false) => Outcome::NeedsThread,
                done => Outcome::Done(done.map(drop)),
            },
            _ => Outcome::NeedsThread,
        }
    }
}
