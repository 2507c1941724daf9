//! From samples to what people and programs read: tables, bench.json.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use crate::{
    contests::Contest,
    figures::Figure,
    jobs::{Cell, Job, Sample},
    machine::Machine,
    measure::Memory,
    spread::Spread,
    table::{digits, table},
    targets::{self, Verdict},
};

/// All that was measured.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) sections: Vec<Section>,
    pub(crate) figures: Vec<Figure>,
    /// What went wrong beside the sections.
    pub(crate) problems: Vec<String>,
}

/// A set of servers compared over a list of jobs.
#[derive(Debug)]
pub(crate) struct Section {
    pub(crate) contest: Contest,
    pub(crate) rows: Vec<Row>,
    /// After the last job, with no client connected.
    pub(crate) memory: Vec<(&'static str, Memory)>,
    /// Servers that are not there, and why; `true`: ours.
    pub(crate) absent: Vec<(bool, String)>,
}

/// A job with its results, one cell for each server that took part.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) job: &'static Job,
    pub(crate) cells: Vec<Cell>,
}

impl Cell {
    fn spread(&self, value: impl Fn(&Sample) -> f64) -> Option<Spread> {
        Spread::of(self.samples.iter().map(value).collect())
    }

    /// Requests a second.
    pub(crate) fn rates(&self) -> Option<Spread> {
        self.spread(Sample::rate)
    }

    /// CPU time of the server for a request, over all rounds, in µs; None: there is no server, or too little to see.
    pub(crate) fn cpu_per_request(&self) -> Option<f64> {
        let cpu: f64 = self.samples.iter().map(|s| s.cpu.as_secs_f64()).sum();
        let requests: u64 = self.samples.iter().map(|s| s.requests).sum();
        (requests > 0 && cpu > 0.0).then(|| cpu * 1e6 / requests as f64)
    }
}

impl Row {
    /// What a contestant achieved.
    pub(crate) fn cell(&self, name: &str) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.name == name)
    }

    /// How many times the rate of `over` that of `of` is, round by round.
    pub(crate) fn ratio(&self, of: &str, over: &str) -> Option<Spread> {
        let (of, over) = (self.cell(of)?, self.cell(over)?);
        Spread::of(of.samples.iter().zip(&over.samples).map(|(a, b)| a.rate() / b.rate()).collect())
    }

    /// How many times the CPU time of `over` for a request `of` needs; the extremes are those of single rounds.
    pub(crate) fn cpu_ratio(&self, of: &str, over: &str) -> Option<Spread> {
        let (of, over) = (self.cell(of)?, self.cell(over)?);
        let median = of.cpu_per_request()? / over.cpu_per_request()?;
        let rounds = of.samples.iter().zip(&over.samples).map(|(a, b)| a.cpu_us() / b.cpu_us());
        let rounds = Spread::of(rounds.filter(|ratio| ratio.is_finite()).collect())?;
        Some(Spread { median, ..rounds })
    }

    /// In thousands of requests or MB a second, or requests a second where those are few.
    pub(crate) fn rate_text(&self, name: &str) -> String {
        let Some(rate) = self.cell(name).and_then(Cell::rates) else { return "–".into() };
        let (scale, unit) = match rate.median {
            _ if self.job.in_megabytes() => (self.job.load.block as f64 / 1e6, "MB/s"),
            few if few < 1000.0 => (1.0, "/s"),
            _ => (1e-3, "k/s"),
        };
        format!("{} {unit}", digits(rate.median * scale))
    }
}

impl Report {
    /// The row of a job.
    pub(crate) fn row(&self, id: &str) -> Option<&Row> {
        self.sections.iter().find_map(|section| section.row(id))
    }

    /// One of the figures.
    pub(crate) fn figure(&self, id: &str, name: &str) -> Option<f64> {
        self.figures.iter().find(|figure| figure.id == id)?.value(name)
    }

    /// Whether a server of this project failed.
    pub(crate) fn ours_failed(&self) -> bool {
        self.sections.iter().flat_map(Section::problems).any(|(ours, _)| ours)
    }

    /// All tables, that of the targets last.
    pub(crate) fn text(&self, verdicts: &[Verdict]) -> String {
        let mut text: String = self.sections.iter().map(|section| section.text(verdicts) + "\n").collect();
        if !self.figures.is_empty() {
            let mut lines = vec![vec!["figures".to_owned(), "each".to_owned()]];
            for figure in &self.figures {
                let values = figure.values.iter().map(|(name, v)| format!("{name} {}", digits(*v)));
                let values = values.collect::<Vec<_>>().join(" / ");
                lines.push(vec![figure.title.into(), format!("{values} {}", figure.unit)]);
            }
            text += &(table(&lines) + "\n");
        }
        for problem in &self.problems {
            let _ = writeln!(text, "- {problem}");
        }
        let head = ["ours, against nbdkit where no other is named", "target", "median", "range", ""];
        let head = [&head[..], &["CPU µs: ours / peer", "system calls: ours / peer"]].concat();
        let mut lines = vec![head.into_iter().map(str::to_owned).collect::<Vec<_>>()];
        lines.extend(verdicts.iter().map(Verdict::line));
        text + &table(&lines)
    }

    /// Everything, for programs.
    pub(crate) fn json(&self, machine: &Machine, verdicts: &[Verdict]) -> Value {
        let figures = self.figures.iter().map(|figure| {
            let values = figure.values.iter().map(|(name, value)| ((*name).to_owned(), json!(value)));
            json!({ "id": figure.id, "title": figure.title, "unit": figure.unit,
                    "values": values.collect::<Map<_, _>>() })
        });
        json!({
            "machine": machine.json,
            "sections": self.sections.iter().map(Section::json).collect::<Vec<_>>(),
            "figures": figures.collect::<Vec<_>>(),
            "targets": verdicts.iter().map(Verdict::json).collect::<Vec<_>>(),
        })
    }
}

impl Section {
    /// One without results yet.
    pub(crate) fn new(contest: Contest) -> Self {
        Section { contest, rows: Vec::new(), memory: Vec::new(), absent: Vec::new() }
    }

    /// The row of a job.
    pub(crate) fn row(&self, id: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.job.id == id)
    }

    /// Memory of one server.
    pub(crate) fn memory_of(&self, name: &str) -> Option<Memory> {
        self.memory.iter().find(|(n, _)| *n == name).map(|(_, memory)| *memory)
    }

    /// What went wrong, a line each; `true`: with a server of this project.
    pub(crate) fn problems(&self) -> Vec<(bool, String)> {
        let failed = self.rows.iter().flat_map(|row| {
            let failed = row.cells.iter().filter_map(|cell| Some((cell, cell.problem.as_ref()?)));
            failed.map(|(cell, why)| (cell.ours, format!("{}: {}: {why}", cell.name, row.job.title)))
        });
        self.absent.iter().cloned().chain(failed).collect()
    }

    fn names(&self) -> Vec<&'static str> {
        self.contest.contestants.iter().map(|contestant| contestant.name).collect()
    }

    /// Three tables: speed, cost of a request, memory.
    fn text(&self, verdicts: &[Verdict]) -> String {
        let mut text = [self.speed(verdicts), self.cost(), self.memory()].join("\n");
        let problems = self.problems();
        if !problems.is_empty() {
            text.push('\n');
        }
        for (_, problem) in problems {
            let _ = writeln!(text, "- {problem}");
        }
        text
    }

    fn speed(&self, verdicts: &[Verdict]) -> String {
        let mut head = vec![format!("{}: speed", self.contest.title)];
        head.extend(self.names().into_iter().map(str::to_owned));
        head.extend(self.contest.ratios.iter().map(|(of, over)| format!("{of} ÷ {over}")));
        let mut lines = vec![head];
        for row in &self.rows {
            let mut line = vec![row.job.title.to_owned()];
            line.extend(self.names().into_iter().map(|name| row.rate_text(name)));
            line.extend(self.contest.ratios.iter().map(|(of, over)| {
                let Some(ratio) = row.ratio(of, over) else { return "–".into() };
                let Spread { median, min, max } = ratio;
                let target = targets::of_rate(verdicts, row.job.id, of, over);
                format!("{median:.2} [{min:.2}–{max:.2}]{target}")
            }));
            lines.push(line);
        }
        table(&lines)
    }

    fn cost(&self) -> String {
        let names = self.names().join(" / ");
        let mut head = vec!["cost of a request".to_owned()];
        head.extend(["CPU µs", "system calls", "p99 µs"].map(|what| format!("{what}: {names}")));
        let mut lines = vec![head];
        for row in &self.rows {
            let each = |value: &dyn Fn(&Cell) -> Option<f64>| {
                let values = self.names().into_iter().map(|name| row.cell(name).and_then(value));
                values.map(|v| v.map_or("–".into(), digits)).collect::<Vec<_>>().join(" / ")
            };
            lines.push(vec![
                row.job.title.to_owned(),
                each(&Cell::cpu_per_request),
                each(&|cell| cell.syscalls),
                each(&|cell| cell.spread(|s| s.p99_us).map(|p99| p99.median).filter(|p99| *p99 > 0.0)),
            ]);
        }
        table(&lines)
    }

    fn memory(&self) -> String {
        let mut head = vec!["memory after the run".to_owned()];
        head.extend(self.names().into_iter().map(str::to_owned));
        let mut lines = vec![head];
        for (what, value) in [("RSS", (|m| m.rss) as fn(Memory) -> u64), ("peak RSS", |m| m.peak)] {
            let mut line = vec![what.to_owned()];
            let mib = |name| self.memory_of(name).map(|m| value(m) as f64 / 1024.0);
            let text = |name| mib(name).map_or("–".into(), |m| format!("{m:.1} MiB"));
            line.extend(self.names().into_iter().map(text));
            lines.push(line);
        }
        table(&lines)
    }

    fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let servers = row.cells.iter().map(|cell| {
                json!({
                    "server": cell.name,
                    "rates": cell.samples.iter().map(Sample::rate).collect::<Vec<_>>(),
                    "cpu_us_per_request": cell.cpu_per_request(),
                    "syscalls_per_request": cell.syscalls,
                    "p50_us": cell.spread(|s| s.p50_us).map(|s| s.median),
                    "p99_us": cell.spread(|s| s.p99_us).map(|s| s.median),
                    "problem": cell.problem,
                })
            });
            let ratios = self.contest.ratios.iter().map(|(of, over)| {
                (format!("{of} ÷ {over}"), row.ratio(of, over).map_or(Value::Null, Spread::json))
            });
            json!({
                "id": row.job.id,
                "title": row.job.title,
                "request_bytes": row.job.load.block,
                "depth": row.job.load.depth,
                "connections": row.job.load.connections,
                "cpus": row.job.cpus.name(),
                "servers": servers.collect::<Vec<_>>(),
                "ratios": ratios.collect::<Map<_, _>>(),
            })
        });
        let memory = self
            .memory
            .iter()
            .map(|(name, memory)| json!({ "server": name, "rss_kib": memory.rss, "peak_kib": memory.peak }));
        json!({
            "title": self.contest.title,
            "rows": rows.collect::<Vec<_>>(),
            "memory": memory.collect::<Vec<_>>(),
            "problems": self.problems().into_iter().map(|(_, problem)| problem).collect::<Vec<_>>(),
        })
    }
}
