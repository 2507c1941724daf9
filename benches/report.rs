//! From samples to what people and programs read: tables, floors, bench.json.

use std::{fmt::Write, time::Duration};

use serde_json::{Value, json};

use crate::{
    jobs::{Cell, Job, Sample},
    measure::Memory,
    servers::Kind,
};

/// A job with its results, one cell for each server that ran.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) job: &'static Job,
    pub(crate) cells: Vec<Cell>,
}

/// A set of servers compared over a list of jobs. The first kind is ours: the one that peers are compared with.
#[derive(Debug)]
pub(crate) struct Section {
    pub(crate) title: &'static str,
    pub(crate) kinds: &'static [Kind],
    pub(crate) rows: Vec<Row>,
    /// After the last job, with no client connected.
    pub(crate) memory: Vec<(Kind, Memory)>,
    /// Servers that are not there, and why.
    pub(crate) absent: Vec<(Kind, String)>,
}

/// Median and extremes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// None of no values.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            1 => values[middle],
            _ => (values[middle - 1] + values[middle]) / 2.0,
        };
        Some(Spread { median, min, max })
    }

    fn json(self) -> Value {
        json!({ "median": self.median, "min": self.min, "max": self.max })
    }
}

impl Cell {
    fn spread(&self, value: impl Fn(&Sample) -> f64) -> Option<Spread> {
        Spread::of(self.samples.iter().map(value).collect())
    }

    /// CPU time of the server for a request, over all rounds, in µs.
    fn cpu_per_request(&self) -> Option<f64> {
        let cpu: Duration = self.samples.iter().map(|s| s.cpu).sum();
        let requests: u64 = self.samples.iter().map(|s| s.requests).sum();
        (requests > 0).then(|| cpu.as_secs_f64() * 1e6 / requests as f64)
    }
}

impl Row {
    fn cell(&self, kind: Kind) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.kind == kind)
    }

    /// How many times the peer's rate ours is, round by round.
    pub(crate) fn ratio(&self, ours: Kind, peer: Kind) -> Option<Spread> {
        let (ours, peer) = (self.cell(ours)?, self.cell(peer)?);
        Spread::of(ours.samples.iter().zip(&peer.samples).map(|(a, b)| a.rate() / b.rate()).collect())
    }

    /// In thousands of requests or MB a second.
    fn rate_text(&self, kind: Kind) -> String {
        let scale = if self.job.in_megabytes() { self.job.load.block as f64 / 1e6 } else { 1e-3 };
        let unit = if self.job.in_megabytes() { "MB/s" } else { "k/s" };
        let rate = self.cell(kind).and_then(|cell| cell.spread(Sample::rate));
        rate.map_or("–".into(), |rate| format!("{} {unit}", figures(rate.median * scale)))
    }
}

impl Section {
    /// The row of a job.
    pub(crate) fn row(&self, id: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.job.id == id)
    }

    /// Memory of one server.
    pub(crate) fn memory_of(&self, kind: Kind) -> Option<Memory> {
        self.memory.iter().find(|(k, _)| *k == kind).map(|(_, memory)| *memory)
    }

    /// What went wrong, a line each; `true`: with a server of this project.
    pub(crate) fn problems(&self) -> Vec<(bool, String)> {
        let absent =
            self.absent.iter().map(|(kind, why)| (kind.is_ours(), format!("{}: {why}", kind.name())));
        let failed = self.rows.iter().flat_map(|row| {
            let cells = row.cells.iter().filter_map(|cell| Some((cell.kind, cell.problem.as_ref()?)));
            cells.map(|(kind, why)| (kind.is_ours(), format!("{}: {}: {why}", kind.name(), row.job.title)))
        });
        absent.chain(failed).collect()
    }

    /// Those that are not ours.
    fn peers(&self) -> Vec<Kind> {
        self.kinds.iter().copied().filter(|kind| !kind.is_ours()).collect()
    }

    /// Three tables in Markdown: speed, cost of a request, memory.
    pub(crate) fn text(&self) -> String {
        let names: Vec<_> = self.kinds.iter().map(|kind| kind.name()).collect();
        let (ours, peers) = (self.kinds[0], self.peers());
        let mut speed = vec![vec![format!("{}: speed", self.title)]];
        speed[0].extend(names.iter().map(ToString::to_string));
        speed[0].extend(peers.iter().map(|&peer| format!("ours ÷ {}", peer.name())));
        let mut cost = vec![vec!["cost of a request".to_owned()]];
        for what in ["CPU µs", "system calls", "p99 µs"] {
            cost[0].push(format!("{what}: {}", names.join(" / ")));
        }
        for row in &self.rows {
            let mut line = vec![row.job.title.to_owned()];
            line.extend(self.kinds.iter().map(|kind| row.rate_text(*kind)));
            line.extend(peers.iter().map(|&peer| row.ratio(ours, peer).map_or("–".into(), ratio_text)));
            speed.push(line);
            let each = |value: &dyn Fn(&Cell) -> Option<f64>| {
                let values = self.kinds.iter().map(|kind| row.cell(*kind).and_then(value));
                values.map(|v| v.map_or("–".into(), figures)).collect::<Vec<_>>().join(" / ")
            };
            cost.push(vec![
                row.job.title.to_owned(),
                each(&Cell::cpu_per_request),
                each(&|cell| cell.syscalls),
                each(&|cell| cell.spread(|s| s.p99_us).map(|p99| p99.median).filter(|p99| *p99 > 0.0)),
            ]);
        }
        let mut memory = vec![vec!["memory after the run".to_owned()]];
        memory[0].extend(names.iter().map(ToString::to_string));
        for (what, value) in [("RSS", (|m| m.rss) as fn(Memory) -> u64), ("peak RSS", |m| m.peak)] {
            let mut line = vec![what.to_owned()];
            let mib = |kind: &Kind| self.memory_of(*kind).map(|m| value(m) as f64 / 1024.0);
            line.extend(self.kinds.iter().map(|k| mib(k).map_or("–".into(), |m| format!("{m:.1} MiB"))));
            memory.push(line);
        }
        let mut text = [table(&speed), table(&cost), table(&memory)].join("\n");
        let problems = self.problems();
        if !problems.is_empty() {
            text.push('\n');
        }
        for (_, problem) in problems {
            let _ = writeln!(text, "- {problem}");
        }
        text
    }

    /// Everything, for programs. Rates are requests a second.
    pub(crate) fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let servers = row.cells.iter().map(|cell| {
                json!({
                    "server": cell.kind.name(),
                    "rates": cell.samples.iter().map(Sample::rate).collect::<Vec<_>>(),
                    "cpu_us_per_request": cell.cpu_per_request(),
                    "syscalls_per_request": cell.syscalls,
                    "p50_us": cell.spread(|s| s.p50_us).map(|s| s.median),
                    "p99_us": cell.spread(|s| s.p99_us).map(|s| s.median),
                    "problem": cell.problem,
                })
            });
            let ratios = self.peers().into_iter().map(|peer| {
                (peer.name().to_owned(), row.ratio(self.kinds[0], peer).map_or(Value::Null, Spread::json))
            });
            json!({
                "id": row.job.id,
                "title": row.job.title,
                "request_bytes": row.job.load.block,
                "depth": row.job.load.depth,
                "one_cpu": row.job.one_cpu,
                "servers": servers.collect::<Vec<_>>(),
                "ratios": ratios.collect::<serde_json::Map<_, _>>(),
            })
        });
        let memory = self.memory.iter().map(
            |(kind, memory)| json!({ "server": kind.name(), "rss_kib": memory.rss, "peak_kib": memory.peak }),
        );
        json!({
            "title": self.title,
            "rows": rows.collect::<Vec<_>>(),
            "memory": memory.collect::<Vec<_>>(),
            "problems": self.problems().into_iter().map(|(_, problem)| problem).collect::<Vec<_>>(),
        })
    }
}

/// A promise about a number.
#[derive(Debug)]
pub(crate) struct Floor {
    pub(crate) what: &'static str,
    /// None: could not be measured here.
    pub(crate) value: Option<f64>,
    pub(crate) bound: f64,
    /// The value must not exceed the bound, rather than reach it.
    pub(crate) at_most: bool,
}

impl Floor {
    /// None: not measured.
    pub(crate) fn holds(&self) -> Option<bool> {
        self.value.map(|value| if self.at_most { value <= self.bound } else { value >= self.bound })
    }

    /// One line.
    pub(crate) fn text(&self) -> String {
        let verdict = match self.holds() {
            Some(true) => "pass",
            Some(false) => "FAIL",
            None => "not measured",
        };
        let sign = if self.at_most { '≤' } else { '≥' };
        let value = self.value.map_or("–".into(), |value| format!("{value:.2}×"));
        format!("{verdict:12}  {}: {value} ({sign} {}×)", self.what, self.bound)
    }

    /// For programs.
    pub(crate) fn json(&self) -> Value {
        json!({ "what": self.what, "value": self.value, "bound": self.bound, "at_most": self.at_most,
                "holds": self.holds() })
    }
}

fn ratio_text(ratio: Spread) -> String {
    format!("{:.2} [{:.2}–{:.2}]", ratio.median, ratio.min, ratio.max)
}

/// Three significant figures or so.
fn figures(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// A Markdown table that is also readable as it stands; numbers to the right.
fn table(lines: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        for (column, cell) in line.iter().enumerate() {
            let width = width(column);
            let _ = match column {
                0 => write!(text, "| {cell:width$} "),
                _ => write!(text, "| {cell:>width$} "),
            };
        }
        text.push_str("|\n");
        if number == 0 {
            for column in 0..line.len() {
                let dashes = "-".repeat(width(column) + 1);
                text.push_str(&if column == 0 { format!("|{dashes}-") } else { format!("|{dashes}:") });
            }
            text.push_str("|\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_takes_the_middle() {
        assert!(Spread::of(Vec::new()).is_none());
        let odd = Spread::of(vec![3.0, 1.0, 2.5]).unwrap();
        assert_eq!((odd.median, odd.min, odd.max), (2.5, 1.0, 3.0));
        assert_eq!(Spread::of(vec![1.0, 2.0]).unwrap().median, 1.5);
    }

    #[test]
    fn floors_have_a_direction() {
        let floor = |value, at_most| Floor { what: "x", value, bound: 2.0, at_most }.holds();
        assert_eq!(floor(Some(2.0), false), Some(true));
        assert_eq!(floor(Some(1.9), false), Some(false));
        assert_eq!(floor(Some(1.9), true), Some(true));
        assert_eq!(floor(Some(2.1), true), Some(false));
        assert_eq!(floor(None, true), None);
    }

    #[test]
    fn table_lines_are_equally_wide() {
        let text = table(&[vec!["µ".into(), "b".into()], vec!["long".into(), "12".into()]]);
        assert_eq!(text, "| µ    |  b |\n|------|---:|\n| long | 12 |\n");
    }
}
