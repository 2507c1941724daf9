//! A disk concatenated from files, disks of other chains, fixed sectors and padding: the handle of the split and
//! partitioning plugins, and of those whose disk is one file.

use std::{any::Any, ops::Range, sync::Arc};

use nbdkit_common::{Piece, Regions};
use nbdkit_core::{
    Call, Caps, Data, Errno, Error, Extents, Flags, Handle, Loan, Outcome, Request, Result, Session, Support,
};

use crate::{block_file::BlockFile, lock::Lock};

/// What a region of the disk is made of.
pub(crate) enum Segment {
    /// The start of a file.
    File(BlockFile),
    /// The disk of another chain, by its number among those that the handle has open.
    Chain(usize),
    /// Bytes that no client can change.
    Fixed(Vec<u8>),
    /// Zeroes that no client can change.
    Padding,
}

/// An open disk. Requests are cut at the borders of its segments.
pub(crate) struct Concat {
    segments: Arc<Regions<Segment>>,
    chains: Vec<Session>,
    writable: bool,
    fast_zero: bool,
    multi_conn: bool,
    flush: bool,
    _locks: Vec<Lock>,
    _held: Option<Box<dyn Any + Send + Sync>>,
}

impl Concat {
    pub(crate) fn new(segments: Arc<Regions<Segment>>) -> Self {
        let all = |is: fn(&BlockFile) -> bool| files(&segments).all(is);
        let (writable, fast_zero) = (all(BlockFile::is_writable), all(BlockFile::zeroes_fast));
        Concat {
            segments,
            chains: Vec::new(),
            writable,
            fast_zero,
            multi_conn: true,
            flush: true,
            _locks: Vec::new(),
            _held: None,
        }
    }

    /// With the disks of other chains. The whole may be written to where one of them may, and refuses to write to the others.
    pub(crate) fn over(self, chains: Vec<Session>) -> Self {
        if chains.is_empty() {
            return self;
        }
        let all = |can: fn(&Caps) -> bool| chains.iter().all(|session| can(session.caps()));
        let any_writable = files(&self.segments).next().is_some() || !all(|caps| !caps.write);
        let (fast_zero, multi_conn) =
            (all(|caps| caps.fast_zero || !caps.write), all(|caps| caps.multi_conn));
        Concat {
            writable: self.writable && any_writable,
            fast_zero: self.fast_zero && fast_zero,
            multi_conn: self.multi_conn && multi_conn,
            chains,
            ..self
        }
    }

    /// For a disk that was never meant to be written to, so that there is nothing to flush.
    pub(crate) fn for_reading(self) -> Self {
        Concat { flush: false, ..self }
    }

    /// For a disk that no other connection may have.
    pub(crate) fn for_one_connection(self) -> Self {
        Concat { multi_conn: false, ..self }
    }

    /// Keeps something as long as it is open.
    pub(crate) fn holding(self, held: Box<dyn Any + Send + Sync>) -> Self {
        Concat { _held: Some(held), ..self }
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
                Segment::Chain(index) if self.chain(*index)?.caps().write => {}
                Segment::Chain(_) => {
                    return Err(Error::new(Errno::EPERM, "attempt to write to a part that is read-only"));
                }
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

    fn chain(&self, index: usize) -> Result<&Session> {
        self.chains.get(index).ok_or_else(|| Error::new(Errno::EIO, "a part of the disk is not open"))
    }

    /// Does something to the files and chains in a range, and makes it durable where FUA is set.
    fn change(
        &self,
        length: u64,
        offset: u64,
        flags: Flags,
        mut change: impl FnMut(&BlockFile, &Piece<'_, Segment>) -> Result<()>,
        mut change_chain: impl FnMut(&Session, Flags, &Piece<'_, Segment>) -> Result<()>,
    ) -> Result<()> {
        let durable = flags.contains(Flags::FUA);
        for piece in self.segments.pieces(offset, length) {
            match &piece.region.kind {
                Segment::File(file) => {
                    change(file, &piece)?;
                    if durable {
                        file.sync()?;
                    }
                }
                Segment::Chain(index) => {
                    let session = self.chain(*index)?;
                    let knows = session.caps().fua != Support::None;
                    change_chain(session, if knows { flags } else { flags - Flags::FUA }, &piece)?;
                    if durable && !knows && session.caps().flush {
                        session.flush()?;
                    }
                }
                Segment::Fixed(_) | Segment::Padding => {}
            }
        }
        Ok(())
    }

    /// Fills `buf`; false: that would have to wait, and it may not.
    fn read(&self, buf: &mut [u8], offset: u64, may_wait: bool) -> Result<bool> {
        for piece in self.segments.pieces(offset, buf.len() as u64) {
            let target = &mut buf[in_request(&piece)];
            let done = match &piece.region.kind {
                Segment::File(file) if may_wait => file.read(target, piece.within).map(|()| true)?,
                Segment::File(file) => file.read_nowait(target, piece.within)?,
                Segment::Chain(index) if may_wait => {
                    self.chain(*index)?.pread(target, piece.within).map(|()| true)?
                }
                Segment::Chain(index) => self.chain(*index)?.pread_nowait(target, piece.within)?,
                Segment::Fixed(bytes) => {
                    target.copy_from_slice(&bytes[in_region(&piece)]);
                    true
                }
                Segment::Padding => {
                    target.fill(0);
                    true
                }
            };
            if !done {
                return Ok(false);
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
        let near = self.chains.is_empty() && files(&self.segments).all(BlockFile::is_near);
        Ok(Caps::native(self.segments.size())
            .with_write(self.writable)
            .with_fast_zero(self.fast_zero)
            .with_flush(self.flush)
            .with_multi_conn(self.multi_conn)
            .with_skip_holes(near))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read(buf, offset, true).map(drop)
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let length = buf.len() as u64;
        self.check_fixed(Some(buf), length, offset)?;
        self.change(
            length,
            offset,
            flags,
            |file, piece| file.write(&buf[in_request(piece)], piece.within),
            |chain, flags, piece| chain.pwrite(&buf[in_request(piece)], piece.within, flags),
        )
    }

    fn flush(&self) -> Result<()> {
        files(&self.segments).try_for_each(BlockFile::sync)?;
        let written = self.chains.iter().filter(|chain| chain.caps().write && chain.caps().flush);
        written.into_iter().try_for_each(Session::flush)
    }

    /// What cannot change stays: a trim promises nothing.
    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.change(
            length,
            offset,
            flags,
            |file, piece| file.discard(piece.length, piece.within),
            |chain, flags, piece| match chain.caps() {
                caps if caps.write && caps.trim => chain.trim(piece.length, piece.within, flags),
                _ => Ok(()),
            },
        )
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.check_fixed(None, length, offset)?;
        let may_trim = flags.contains(Flags::MAY_TRIM);
        self.change(
            length,
            offset,
            flags,
            |file, piece| file.zero(piece.length, piece.within, may_trim),
            |chain, flags, piece| chain.zero(piece.length, piece.within, flags),
        )
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        for piece in self.segments.pieces(offset, length) {
            let at = offset + piece.at;
            match &piece.region.kind {
                Segment::File(file) => file.extents(piece.length, piece.within, flags, at, extents)?,
                Segment::Chain(index) => {
                    let end = piece.within + piece.length;
                    for e in self.chain(*index)?.extents(piece.length, piece.within, flags)? {
                        let (from, to) = (e.offset.max(piece.within), e.end().min(end));
                        if from < to {
                            extents.add(at + (from - piece.within), to - from, e.hole, e.zero)?;
                        }
                    }
                }
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
        self.change(
            length,
            offset,
            Flags::empty(),
            |file, piece| file.advise_will_need(piece.length, piece.within),
            |chain, _, piece| match chain.caps().cache {
                Support::None => Ok(()),
                _ => chain.cache(piece.length, piece.within),
            },
        )
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
            Data::Read(buf) => match self.read(buf, offset, false) {
                Ok(false) => Outcome::NeedsThread,
                done => Outcome::Done(done.map(drop)),
            },
            _ => Outcome::NeedsThread,
        }
    }
}
