//! The checks, each over every row.

use super::*;

const ZERO_FLAGS: &[Flags] = &[Flags::MAY_TRIM, Flags::FUA, Flags::FAST_ZERO];

/// The errno of a request that has to fail.
fn errno<T: std::fmt::Debug>(result: Result<T>) -> Errno {
    result.unwrap_err().errno()
}

#[test]
fn sizes_and_capabilities() {
    for_each_row(|subject| {
        let session = subject.open(false);
        assert_eq!(session.size(), subject.row.size);
        assert_eq!(describe(session.caps()), subject.row.caps);
        drop(session);
        let session = subject.open(true);
        assert_eq!(session.size(), subject.row.size);
        let caps = session.caps();
        assert!(!caps.write && !caps.trim && caps.zero == Support::None && caps.fua == Support::None);
    });
}

#[test]
fn reads_agree_at_every_boundary() {
    for_each_row(|subject| {
        let area = subject.row.area.clone();
        for readonly in [false, true] {
            let session = subject.open(readonly);
            if area.is_empty() {
                continue;
            }
            let whole = read(&session, area.clone());
            let middle = area.start + (area.end - area.start) / 2;
            for start in [area.start, area.start + 1, middle, middle + 7, area.end - 513, area.end - 1] {
                for length in [1, 7, 511, 512, 4096, 65537] {
                    let start = start.max(area.start);
                    let range = start..(start + length).min(area.end);
                    let want = &whole[(range.start - area.start) as usize..(range.end - area.start) as usize];
                    assert!(read(&session, range.clone()) == want, "{range:?}");
                    let mut buf = vec![0; want.len()];
                    if session.pread_nowait(&mut buf, range.start).unwrap() {
                        assert!(buf == want, "{range:?} without waiting");
                    }
                }
            }
        }
    });
}

#[test]
fn bad_requests_are_refused() {
    for_each_row(|subject| {
        let size = subject.row.size;
        let session = subject.open(false);
        let bad = [(0, 0), (1, size), (2, size.saturating_sub(1)), (1, u64::MAX), (8, i64::MAX as u64 - 1)];
        for (length, offset) in bad {
            let mut buf = vec![0; length as usize];
            assert_eq!(errno(session.pread(&mut buf, offset)), Errno::EINVAL);
            assert_eq!(errno(session.extents(length, offset, Flags::empty())), Errno::EINVAL);
            assert_eq!(errno(session.cache(length, offset)), Errno::EINVAL);
            let (write, trim) = match session.caps().write {
                true => (Errno::ENOSPC, Errno::EINVAL),
                false => (Errno::EPERM, Errno::EPERM),
            };
            assert_eq!(errno(session.pwrite(&buf, offset, Flags::empty())), write);
            assert_eq!(errno(session.zero(length, offset, Flags::empty())), write);
            assert_eq!(errno(session.trim(length, offset, Flags::empty())), trim);
        }
        drop(session);
        if size > 0 {
            let session = subject.open(true);
            assert_eq!(errno(session.pwrite(&[1], 0, Flags::empty())), Errno::EPERM);
            assert_eq!(errno(session.zero(1, 0, Flags::MAY_TRIM)), Errno::EPERM);
            assert_eq!(errno(session.trim(1, 0, Flags::empty())), Errno::EPERM);
        }
    });
}

#[test]
fn writes_do_what_the_plugin_promises() {
    for_each_row(|subject| {
        let Row { area, writes, .. } = subject.row;
        if area.is_empty() || *writes == Writes::Refused {
            return;
        }
        let session = subject.open(false);
        let mut want = read(&session, area.clone());
        for flags in combinations(session.caps(), &[Flags::FUA]) {
            for (at, length) in [(0, 1), (1, 511), (4000, 96), (1000, 3000), (want.len() - 1, 1)] {
                let data: Vec<u8> = (0..length).map(|i| (i * 7 + at) as u8 | 1).collect();
                match (writes, session.pwrite(&data, area.start + at as u64, flags)) {
                    (Writes::Fail(errno), result) => assert_eq!(result.unwrap_err().errno(), *errno),
                    (_, result) => result.unwrap(),
                }
                if *writes == Writes::Kept {
                    want[at..at + length].copy_from_slice(&data);
                }
                assert!(read(&session, area.clone()) == want, "{length} bytes at {at} with {flags:?}");
            }
        }
        if session.caps().flush {
            session.flush().unwrap();
        }
        drop(session);
        assert!(read(&subject.open(true), area.clone()) == want, "after the last client left");
    });
}

#[test]
fn zero_and_trim_keep_their_promises() {
    for_each_row(|subject| {
        let Row { area, writes, .. } = subject.row;
        if area.is_empty() || *writes == Writes::Refused {
            return;
        }
        let session = subject.open(false);
        let length = area.end - area.start;
        let ranges =
            [0..1, 0..length.min(8192), 1..length.min(12289) - 1, length.saturating_sub(4097)..length];
        let spots = ranges.map(|r| area.start + r.start..area.start + r.end);
        for spot in spots {
            for flags in combinations(session.caps(), ZERO_FLAGS) {
                zero(&session, subject.row, &spot, flags);
            }
            for flags in combinations(session.caps(), &[Flags::FUA]) {
                trim(&session, subject.row, &spot, flags);
            }
        }
        if session.caps().fua == Support::None {
            assert_eq!(errno(session.zero(1, area.start, Flags::FUA)), Errno::EINVAL);
            assert_eq!(errno(session.trim(1, area.start, Flags::FUA)), Errno::EINVAL);
        }
    });
}

/// Fills the area, if that can be, and returns what it holds.
fn fill(session: &Session, row: &Row) -> Vec<u8> {
    if row.writes == Writes::Kept {
        let data = vec![0x5a; (row.area.end - row.area.start) as usize];
        session.pwrite(&data, row.area.start, Flags::empty()).unwrap();
    }
    read(session, row.area.clone())
}

fn within(row: &Row, spot: &Range<u64>) -> Range<usize> {
    (spot.start - row.area.start) as usize..(spot.end - row.area.start) as usize
}

fn zero(session: &Session, row: &Row, spot: &Range<u64>, flags: Flags) {
    let mut want = fill(session, row);
    let result = session.zero(spot.end - spot.start, spot.start, flags);
    match (row.writes, result) {
        (_, Err(e)) if flags.contains(Flags::FAST_ZERO) && e.is_unsupported() => {}
        (Writes::Fail(errno), result) => assert_eq!(result.unwrap_err().errno(), errno),
        (Writes::Kept, result) => {
            result.unwrap();
            want[within(row, spot)].fill(0);
        }
        (_, result) => result.unwrap(),
    }
    assert!(read(session, row.area.clone()) == want, "zero {spot:?} with {flags:?}");
}

fn trim(session: &Session, row: &Row, spot: &Range<u64>, flags: Flags) {
    let length = spot.end - spot.start;
    if !session.caps().trim {
        assert_eq!(errno(session.trim(length, spot.start, flags)), Errno::EINVAL);
        return;
    }
    let mut want = fill(session, row);
    match (row.writes, session.trim(length, spot.start, flags)) {
        (Writes::Fail(errno), result) => assert_eq!(result.unwrap_err().errno(), errno),
        (_, result) => result.unwrap(),
    }
    let got = read(session, row.area.clone());
    if row.writes == Writes::Kept {
        // Within the range anything goes.
        want[within(row, spot)].copy_from_slice(&got[within(row, spot)]);
    }
    assert!(got == want, "trim {spot:?} with {flags:?}");
}

#[test]
fn extents_cover_the_range_and_are_true() {
    for_each_row(|subject| {
        let Row { area, writes, .. } = subject.row;
        if area.is_empty() {
            return;
        }
        let session = subject.open(false);
        let length = area.end - area.start;
        if *writes == Writes::Kept {
            for at in [0, length / 3, length - 1] {
                session.pwrite(&[1], area.start + at, Flags::empty()).unwrap();
            }
        }
        for start in [area.start, area.start + 1, area.start + length / 3, area.end - 1] {
            let mut at = start;
            while at < area.end {
                let one = session.extents(area.end - at, at, Flags::REQ_ONE).unwrap();
                assert_eq!(one.len(), 1);
                let list = session.extents(area.end - at, at, Flags::empty()).unwrap();
                assert!(!list.is_empty());
                for extent in list {
                    assert_eq!(extent.offset, at);
                    assert!(extent.length > 0 && extent.end() <= area.end);
                    if extent.zero {
                        let data = read(&session, at..extent.end());
                        assert!(data.iter().all(|b| *b == 0), "{extent:?} is not zero");
                    }
                    at = extent.end();
                }
            }
        }
    });
}

#[test]
fn flush_and_cache_succeed_where_offered() {
    for_each_row(|subject| {
        let session = subject.open(false);
        match session.caps().flush {
            true => session.flush().unwrap(),
            false => assert_eq!(errno(session.flush()), Errno::EINVAL),
        }
        if subject.row.size > 0 {
            let length = subject.row.size.min(1 << 20);
            match session.caps().cache {
                Support::None => assert_eq!(errno(session.cache(length, 0)), Errno::EINVAL),
                _ => session.cache(length, 0).unwrap(),
            }
        }
    });
}

#[test]
fn two_connections_see_one_disk() {
    for_each_row(|subject| {
        let Row { area, writes, .. } = subject.row;
        let first = subject.open(false);
        if !first.caps().multi_conn || area.is_empty() {
            return;
        }
        let second = subject.open(true);
        assert!(read(&first, area.clone()) == read(&second, area.clone()));
        if *writes == Writes::Kept {
            first.pwrite(b"seen by both", area.start + 5, Flags::empty()).unwrap();
            assert_eq!(read(&second, area.start + 5..area.start + 17), b"seen by both");
        }
    });
}

#[test]
fn a_loan_reads_as_the_disk_does() {
    use std::os::unix::fs::FileExt as _;
    for_each_row(|subject| {
        let Row { area, writes, .. } = subject.row;
        let session = subject.open(false);
        if area.is_empty() {
            return;
        }
        if *writes == Writes::Kept {
            session.pwrite(b"lent", area.end - 9, Flags::empty()).unwrap();
        }
        let want = read(&session, area.clone());
        let length = area.end - area.start;
        let Some((fd, offset)) = lend(&session, Op::Read, area.start, length) else { return };
        let mut got = vec![0; want.len()];
        File::from(fd).read_exact_at(&mut got, offset).unwrap();
        assert!(got == want);
        assert!(session.caps().write || lend(&session, Op::Write, area.start, length).is_none());
        assert!(lend(&subject.open(true), Op::Write, area.start, 1).is_none());
    });
}

/// Sixteen threads on two connections, each with a part of the disk of its own, at odd boundaries.
#[test]
fn requests_in_parallel_do_not_mix() {
    for_each_row(|subject| {
        let Row { area, writes, .. } = subject.row;
        if *writes != Writes::Kept || area.end - area.start < 4096 {
            return;
        }
        let first = subject.open(false);
        // One that serializes connections waits for the first to leave.
        let second = first.caps().multi_conn.then(|| subject.open(false));
        let part = (area.end - area.start) / 16;
        std::thread::scope(|scope| {
            for i in 0..16 {
                let session = second.as_ref().filter(|_| i % 2 == 1).unwrap_or(&first);
                scope.spawn(move || {
                    let start = area.start + i * part;
                    busy(session, start..start + part, i + 1);
                });
            }
        });
    });
}

/// Many requests to one part of a disk, compared with what that part should hold.
fn busy(session: &Session, part: Range<u64>, seed: u64) {
    let mut model = read(session, part.clone());
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    for _ in 0..100 {
        let at = random(model.len());
        let length = 1 + random((model.len() - at).min(5000));
        let (count, offset) = (length as u64, part.start + at as u64);
        let spot = at..at + length;
        match random(8) {
            0..3 => {
                let byte = random(256) as u8;
                session.pwrite(&vec![byte; length], offset, Flags::empty()).unwrap();
                model[spot].fill(byte);
            }
            3 => {
                session.zero(count, offset, Flags::MAY_TRIM).unwrap();
                model[spot].fill(0);
            }
            4 if session.caps().trim => {
                session.trim(count, offset, Flags::empty()).unwrap();
                model[spot].copy_from_slice(&read(session, offset..offset + count));
            }
            5 => drop(session.extents(count, offset, Flags::empty()).unwrap()),
            _ => assert!(read(session, offset..offset + count) == model[spot], "{count} bytes at {offset}"),
        }
    }
    assert!(read(session, part) == model);
}
