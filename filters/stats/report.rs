//! What was counted, as text for people and as JSON for programs.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

/// What is known of the requests of one kind.
#[derive(Clone, Debug, Default)]
pub(super) struct Counter {
    ops: u64,
    bytes: u64,
    took: Duration,
    /// By the number of bits of the length: 9 for 512 to 1023 bytes.
    sizes: BTreeMap<u32, Size>,
}

/// What is known of the requests of about one size.
#[derive(Clone, Debug, Default)]
struct Size {
    requests: u64,
    bytes: u64,
    /// How many had an offset of exactly so many zero bits at the end; 64 for offset 0.
    alignment: BTreeMap<u32, u64>,
}

impl Counter {
    pub(super) fn count(&mut self, length: u64, offset: u64, took: Duration) {
        self.ops += 1;
        self.bytes += length;
        self.took += took;
        if let Some(bits) = length.checked_ilog2() {
            let size = self.sizes.entry(bits).or_default();
            size.requests += 1;
            size.bytes += length;
            *size.alignment.entry(offset.trailing_zeros()).or_default() += 1;
        }
    }
}

pub(super) struct Report {
    pub(super) elapsed: Duration,
    /// Sizes and alignments are told until they cover this share of requests, in percent; 0: not at all.
    pub(super) threshold: u8,
    pub(super) counters: Vec<(&'static str, Counter)>,
}

impl Report {
    pub(super) fn text(&self) -> String {
        let elapsed = self.elapsed;
        let ops: u64 = self.counters.iter().map(|(_, counter)| counter.ops).sum();
        // What is only asked about or read ahead is not moved.
        let moved = self.counters.iter().filter(|(name, _)| !matches!(*name, "extents" | "cache"));
        let bytes: u64 = moved.map(|(_, counter)| counter.bytes).sum();
        let mut text = format!(
            "total: {ops} ops, {:.6} s, {}, {}\n",
            elapsed.as_secs_f64(),
            amount(bytes as f64),
            rate(bytes, elapsed)
        );
        for (name, counter) in self.counters.iter().filter(|(_, counter)| counter.ops > 0) {
            let Counter { ops, bytes, took, .. } = counter;
            let _ = writeln!(
                text,
                "{name}: {ops} ops, {:.6} s, {}, {} op, {} total",
                took.as_secs_f64(),
                amount(*bytes as f64),
                rate(*bytes, *took),
                rate(*bytes, elapsed)
            );
            if self.threshold > 0 && !counter.sizes.is_empty() {
                self.breakdown(counter, &mut text);
            }
        }
        text
    }

    /// The sizes of requests, the most frequent first.
    fn breakdown(&self, counter: &Counter, text: &mut String) {
        text.push_str("  Request size and alignment breakdown:\n");
        let total: u64 = counter.sizes.values().map(|size| size.requests).sum();
        let mut sizes: Vec<_> = counter.sizes.iter().collect();
        sizes.sort_by_key(|(_, size)| std::cmp::Reverse(size.requests));
        let (mut told, mut told_bytes) = (0, 0);
        for (bits, size) in sizes {
            if told > 0 && percent(told, total) >= f64::from(self.threshold) {
                break;
            }
            told += size.requests;
            told_bytes += size.bytes;
            let share = percent(size.requests, total);
            let (requests, bytes) = (size.requests, amount(size.bytes as f64));
            let _ = writeln!(text, "{bits:6} bits: {share:4.1}% ({requests} reqs, {bytes} total)");
            for (bits, aligned) in size.at_least() {
                let share = percent(aligned, size.requests);
                if share > 100.0 - f64::from(self.threshold) || aligned == size.requests {
                    let _ = writeln!(text, "{bits:11} bit aligned: {share:5.1}% ({aligned})");
                }
            }
        }
        if told < total {
            let (share, requests) = (percent(total - told, total), total - told);
            let bytes = amount((counter.bytes - told_bytes) as f64);
            let _ = writeln!(text, "    other sizes: {share:4.1}% ({requests} reqs, {bytes} total)");
        }
        text.push('\n');
    }

    /// One object in one line, so that reports can be appended.
    pub(super) fn json(&self) -> String {
        let mut kinds = Vec::new();
        for (name, counter) in &self.counters {
            let Counter { ops, bytes, took, sizes } = counter;
            let sizes = object(sizes.iter().map(|(bits, size)| {
                let Size { requests, bytes, alignment } = size;
                let alignment = object(alignment.iter().map(|(bits, n)| (bits, n.to_string())));
                (bits, format!("{{\"requests\":{requests},\"bytes\":{bytes},\"alignment\":{alignment}}}"))
            }));
            let seconds = took.as_secs_f64();
            let fields =
                format!("{{\"ops\":{ops},\"bytes\":{bytes},\"seconds\":{seconds},\"sizes\":{sizes}}}");
            kinds.push((name, fields));
        }
        format!("{{\"elapsed\":{},\"operations\":{}}}\n", self.elapsed.as_secs_f64(), object(kinds))
    }
}

impl Size {
    /// Alignments that occur, with how many requests have them or a better one. Offset 0 has all.
    fn at_least(&self) -> Vec<(u32, u64)> {
        let mut left = self.requests;
        let mut list = Vec::new();
        for (bits, exactly) in &self.alignment {
            if *bits < u64::BITS {
                list.push((*bits, left));
            }
            left -= exactly;
        }
        list
    }
}

/// A JSON object of names that need no escapes and values that are JSON.
fn object<K: std::fmt::Display>(fields: impl IntoIterator<Item = (K, String)>) -> String {
    let fields: Vec<_> = fields.into_iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
    format!("{{{}}}", fields.join(","))
}

fn percent(part: u64, total: u64) -> f64 {
    100.0 * part as f64 / total as f64
}

fn rate(bytes: u64, time: Duration) -> String {
    if time.is_zero() {
        return "(n/a)/s".to_owned();
    }
    format!("{}/s", amount(bytes as f64 / time.as_secs_f64()))
}

fn amount(bytes: f64) -> String {
    let units = [(1_u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.into_iter().find(|(unit, _)| bytes >= *unit as f64) {
        Some((unit, name)) => format!("{:.2} {name}", bytes / unit as f64),
        None => format!("{bytes:.0} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counter(requests: &[(u64, u64, u64)], seconds: u64) -> Counter {
        let mut counter = Counter::default();
        for (n, length, offset) in requests {
            for _ in 0..*n {
                counter.count(*length, *offset, Duration::ZERO);
            }
        }
        counter.took = Duration::from_secs(seconds);
        counter
    }

    fn report(threshold: u8) -> Report {
        let read = counter(&[(6, 4096, 4096), (3, 4097, 8192), (1, 512, 0), (1, 1 << 20, 0)], 2);
        Report {
            elapsed: Duration::from_secs(4),
            threshold,
            counters: vec![
                ("read", read),
                ("write", Counter::default()),
                ("extents", counter(&[(1, 1 << 30, 0)], 0)),
                ("flush", counter(&[(2, 0, 0)], 1)),
            ],
        }
    }

    #[test]
    fn the_report_for_people() {
        let expected = "\
total: 14 ops, 4.000000 s, 1.04 MiB, 265.13 KiB/s
read: 11 ops, 2.000000 s, 1.04 MiB, 530.25 KiB/s op, 265.13 KiB/s total
  Request size and alignment breakdown:
    12 bits: 81.8% (9 reqs, 36.00 KiB total)
         12 bit aligned: 100.0% (9)
         13 bit aligned:  33.3% (3)
     9 bits:  9.1% (1 reqs, 512 bytes total)
    other sizes:  9.1% (1 reqs, 1.00 MiB total)

extents: 1 ops, 0.000000 s, 1.00 GiB, (n/a)/s op, 256.00 MiB/s total
  Request size and alignment breakdown:
    30 bits: 100.0% (1 reqs, 1.00 GiB total)

flush: 2 ops, 1.000000 s, 0 bytes, 0 bytes/s op, 0 bytes/s total
";
        assert_eq!(report(90).text(), expected);
    }

    #[test]
    fn the_threshold_says_how_much_is_told() {
        let lines = |threshold| report(threshold).text().lines().count();
        assert_eq!(lines(0), 4);
        assert!(lines(50) < lines(90));
        assert!(!report(100).text().contains("other sizes"));
        assert!(report(100).text().contains("20 bits"));
    }

    #[test]
    fn the_report_for_programs() {
        let json = report(90).json();
        let read = "\"read\":{\"ops\":11,\"bytes\":1085955,\"seconds\":2,\"sizes\":{\"9\":\
                    {\"requests\":1,\"bytes\":512,\"alignment\":{\"64\":1}},\"12\":";
        assert!(json.starts_with(&format!("{{\"elapsed\":4,\"operations\":{{{read}")), "{json}");
        assert!(json.ends_with("\"flush\":{\"ops\":2,\"bytes\":0,\"seconds\":1,\"sizes\":{}}}}\n"), "{json}");
    }
}
