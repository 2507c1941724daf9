//! bench.svg: bars of rates, ours beside the peers', two columns at the width of a page on GitHub.
//!
//! Drawn by hand: a chart crate would bring more code than this needs, and none draws for light and dark pages.

use std::fmt::Write;

use crate::{
    report::{Report, Row},
    table::digits,
};

/// Title of a group of bars, and its job.
type Group = (&'static str, &'static str);

const COLUMNS: [&[Group]; 2] = [
    &[
        ("NBD, 4 KiB reads, depth 16, one CPU", "nbd-read-d16"),
        ("NBD, 4 KiB reads, depth 64", "nbd-read-d64-all"),
        ("NBD, 1 MiB reads", "nbd-stream-read"),
        ("NBD, 1 MiB writes", "nbd-stream-write"),
        ("NBD, memory, 4 KiB writes, depth 16", "memory-write-d16"),
        ("NBD, copy over TLS", "tls-copy"),
    ],
    &[
        ("FUSE, direct 4 KiB reads, depth 1, one CPU", "fuse-read-d1"),
        ("FUSE, direct 4 KiB reads, depth 16", "fuse-read-d16"),
        ("FUSE, direct 1 MiB reads", "fuse-stream-read"),
        ("FUSE, cached 4 KiB reads", "fuse-cached"),
        ("NBD, C plugin, 4 KiB reads, depth 16", "c-plugin-d16"),
        ("Start to exit", "start"),
    ],
];

const WIDTH: u32 = 880;
const COLUMN: u32 = 420;
/// Where the bars begin, in a column.
const LABELS: u32 = 116;
const LONGEST: f64 = 190.0;
const TOP: u32 = 52;
const TITLE: u32 = 21;
const BAR: u32 = 17;
const GAP: u32 = 13;
const FOOT: u32 = 24;

/// GitHub's colours. An image follows the reader's preference by the media query.
const STYLE: &str = "\
text { font: 12px -apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif; fill: #1f2328 }
.head { font-size: 16px; font-weight: 600 }
.title { font-weight: 600 }
.muted { fill: #59636e }
.ours { fill: #0969da }
.peer { fill: #afb8c1 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .muted { fill: #9198a1 }
  .ours { fill: #4493f8 }
  .peer { fill: #59636e }
}";

/// Draws what was measured; groups that were not are left out. `footer` says where.
pub(crate) fn svg(report: &Report, footer: &str) -> String {
    let (mut body, mut height) = (String::new(), TOP);
    for (index, groups) in COLUMNS.iter().enumerate() {
        let x = index as u32 * (WIDTH - COLUMN);
        let mut y = TOP;
        for (title, job) in *groups {
            if let Some(row) = report.row(job) {
                y += group(&mut body, report, row, title, (x, y));
            }
        }
        height = height.max(y);
    }
    height += FOOT;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"Rates of this project and its peers\">\n\
         <style>\n{STYLE}\n</style>\n"
    );
    svg += &text(0, 20, "head", "start", "Requests and bytes a second: longer is faster");
    svg += &text(
        0,
        38,
        "muted",
        "start",
        "medians of interleaved runs; × is how many times the rate of that peer ours is",
    );
    svg += &body;
    svg += &text(0, height - 6, "muted", "start", footer);
    svg + "</svg>\n"
}

/// Draws the bars of a job and returns their height.
fn group(svg: &mut String, report: &Report, row: &Row, title: &str, (x, y): (u32, u32)) -> u32 {
    let bars: Vec<_> = row.cells.iter().filter_map(|cell| Some((cell, cell.rates()?.median))).collect();
    let longest = bars.iter().map(|(_, rate)| *rate).fold(f64::MIN_POSITIVE, f64::max);
    *svg += &text(x, y + 13, "title", "start", title);
    let mut top = y + TITLE;
    for (cell, rate) in bars {
        let (class, width) = (if cell.ours { "ours" } else { "peer" }, rate / longest * LONGEST);
        let (left, height) = (x + LABELS, BAR - 4);
        *svg += &text(left - 6, top + 11, "", "end", cell.name);
        let _ = writeln!(
            svg,
            "<rect class=\"{class}\" x=\"{left}\" y=\"{top}\" width=\"{width:.1}\" height=\"{height}\" rx=\"2\"/>"
        );
        let end = left + width as u32 + 6;
        *svg += &text(end, top + 11, "muted", "start", &row.rate_text(cell.name));
        *svg += &text(x + COLUMN, top + 11, "", "end", &ratio(report, row, cell.name));
        top += BAR;
    }
    top + GAP - y
}

/// How many times the rate of a peer ours is; empty where the section does not compare them.
fn ratio(report: &Report, row: &Row, peer: &str) -> String {
    let section = report.sections.iter().find(|section| section.row(row.job.id).is_some());
    let pair = section.and_then(|section| section.contest.ratios.iter().find(|(_, over)| *over == peer));
    let ratio = pair.and_then(|(of, over)| row.ratio(of, over));
    ratio.map_or(String::new(), |ratio| format!("{}×", digits(ratio.median)))
}

fn text(x: u32, y: u32, class: &str, anchor: &str, words: &str) -> String {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    format!("<text class=\"{class}\" x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{words}</text>\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        contests::CONTESTS,
        jobs::{Cell, Sample},
        report::Section,
    };

    fn report(id: &str, rates: &[(&'static str, u64)]) -> Report {
        let contest = CONTESTS.iter().find(|c| c.jobs.iter().any(|job| job.id == id)).unwrap();
        let job = contest.jobs.iter().find(|job| job.id == id).unwrap();
        let cell = |&(name, requests)| Cell {
            name,
            ours: name == "ours",
            samples: vec![Sample { requests, seconds: 1.0, ..Sample::default() }],
            syscalls: None,
            problem: None,
        };
        let mut section = Section::new(*contest);
        section.rows.push(Row { job, cells: rates.iter().map(cell).collect() });
        Report { sections: vec![section], ..Report::default() }
    }

    #[test]
    fn bars_are_in_proportion() {
        let svg = svg(&report("nbd-read-d16", &[("ours", 4000), ("nbdkit", 1000)]), "a < b & c");
        let widths: Vec<f64> = svg
            .lines()
            .filter_map(|line| line.strip_prefix("<rect")?.split("width=\"").nth(1)?.split('"').next())
            .map(|width| width.parse().unwrap())
            .collect();
        assert_eq!(widths, [LONGEST, LONGEST / 4.0]);
        assert!(svg.contains(">4.00×<") && svg.contains("a &lt; b &amp; c"));
    }

    #[test]
    fn every_group_has_a_job() {
        for (title, job) in COLUMNS.into_iter().flatten() {
            assert!(CONTESTS.iter().any(|c| c.jobs.iter().any(|j| j.id == *job)), "{title}");
        }
    }

    #[test]
    fn an_empty_report_is_still_a_picture() {
        let svg = svg(&Report::default(), "nowhere");
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n") && !svg.contains("<rect"));
    }
}
