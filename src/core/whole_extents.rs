//! The extents of a layer over the whole of a range, or in whole blocks. A layer may answer for less than it was asked
//! for, at any boundary; a layer above that needs more gets it here, by asking on.

use crate::{Call, Data, Extents, Flags, Next, Op, Outcome, Request, Result};

impl Next {
    /// All extents of a range, however often the layer has to be asked. The last one may pass its end.
    ///
    /// # Errors
    /// Those of the layer; `EINVAL` out of range.
    pub fn extents_full(&self, length: u64, offset: u64) -> Result<Extents> {
        let end = offset.saturating_add(length);
        let mut all = Extents::new(offset, end);
        while offset < end && !all.is_complete() {
            let from = all.covered_to();
            let mut part = Extents::new(from, end);
            self.extents(end - from, from, Flags::empty(), &mut part)?;
            for e in part.as_slice() {
                all.add(e.offset, e.length, e.hole, e.zero)?;
            }
        }
        Ok(all)
    }

    /// Adds the extents of a range in whole blocks of `align` bytes; the block at the end of the disk may be a part of
    /// one. `offset` is aligned. A block of several kinds is a hole, or zero, if all of it is. There is at least one
    /// extent; they may end before the range does, and the last one may pass its end. Flags: REQ_ONE.
    ///
    /// # Errors
    /// Those of the layer; `EINVAL` out of range.
    pub fn extents_aligned(
        &self,
        length: u64,
        offset: u64,
        flags: Flags,
        align: u64,
        extents: &mut Extents,
    ) -> Result<()> {
        if align <= 1 {
            return self.extents(length, offset, flags, extents);
        }
        let size = self.caps().size;
        let mut below = Extents::new(offset, offset.saturating_add(length));
        self.extents(length, offset, flags, &mut below)?;
        if !add_blocks(&below, align, size, extents)? && length > 0 {
            // So far less is known than one block.
            let block = align.min(size - offset);
            let parts = self.extents_full(block, offset)?;
            let (hole, zero) = parts
                .as_slice()
                .iter()
                .fold((true, true), |(hole, zero), e| (hole && e.hole, zero && e.zero));
            extents.add(offset, block, hole, zero)?;
        }
        Ok(())
    }

    /// Answers an extents request of a layer above by those of a range below, as
    /// [`extents_aligned`](Self::extents_aligned) does, whether it may wait or not.
    pub fn whole_blocks(
        &self,
        request: &mut Request<'_>,
        offset: u64,
        length: u64,
        align: u64,
    ) -> Outcome<'_> {
        let (flags, may_wait) = (request.flags(), request.may_wait());
        let Data::Extents(extents) = request.data() else { return Outcome::NeedsThread };
        if may_wait {
            return Outcome::Done(self.extents_aligned(length, offset, flags, align, extents));
        }
        let call = Call::new(Op::Extents, offset, length).with_flags(flags);
        let mut below = Extents::new(offset, call.end());
        match self.piece(call, Data::Extents(&mut below), false) {
            Outcome::Done(Ok(())) => match add_blocks(&below, align.max(1), self.caps().size, extents) {
                Ok(true) => Outcome::Done(Ok(())),
                Ok(false) => Outcome::NeedsThread,
                Err(e) => Outcome::Done(Err(e)),
            },
            outcome => outcome,
        }
    }
}

/// Makes whole blocks of `align` bytes of what is below; false: there is less than one.
fn add_blocks(below: &Extents, align: u64, size: u64, extents: &mut Extents) -> Result<bool> {
    let mut at = below.start();
    // What is known of the block at `at`, if it is of several kinds.
    let mut mixed: Option<(bool, bool)> = None;
    for e in below.as_slice() {
        if let Some((hole, zero)) = mixed.take() {
            let (hole, zero) = (hole && e.hole, zero && e.zero);
            let boundary = (at + align).min(size);
            if e.end() < boundary {
                mixed = Some((hole, zero));
                continue;
            }
            extents.add(at, boundary - at, hole, zero)?;
            at = boundary;
        }
        let whole = if e.end() >= size { size } else { e.end() - e.end() % align };
        extents.add(at, whole.saturating_sub(at), e.hole, e.zero)?;
        at = at.max(whole);
        mixed = (e.end() > at).then_some((e.hole, e.zero));
    }
    Ok(at > below.start())
}
