//! What this project wants to reach, and whether it does. [`list`] has the numbers.

mod list;

use serde_json::{Value, json};

use crate::{jobs::Cell, lineup, report::Report, spread::Spread, table::digits};

/// A bound for a number of the report.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    /// In the words of the table of targets.
    pub(crate) work: &'static str,
    pub(crate) measure: Measure,
    pub(crate) bound: Bound,
}

/// Which number. Jobs are given by id, contestants by name.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Measure {
    /// How many times the second contestant's rate the first has.
    Rate(&'static str, &'static str, &'static str),
    /// The rate of a contestant in the first job in relation to the second.
    RateOfJobs(&'static str, &'static str, &'static str),
    /// How many times the second contestant's CPU time for a request the first needs.
    Cpu(&'static str, &'static str, &'static str),
    /// The CPU time of a contestant for a request in the first job in relation to the second.
    CpuOfJobs(&'static str, &'static str, &'static str),
    /// The time that a request takes, in relation to the second contestant.
    Time(&'static str, &'static str, &'static str),
    /// CPU time of a contestant for a request, in ms.
    CpuMs(&'static str, &'static str),
    /// CPU time that each of so many layers adds to a request, in ns, when the first contestant has them and the second
    /// does not.
    LayerNs(&'static str, &'static str, &'static str, u32),
    /// Memory after the run of a section with that job.
    Rss(&'static str, &'static str, &'static str),
    /// One of the [`figures`](crate::figures), of a contestant.
    Figure(&'static str, &'static str),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

use Bound::{AtLeast, AtMost};
use Measure::{Cpu, CpuMs, CpuOfJobs, Figure, LayerNs, Rate, RateOfJobs, Rss, Time};
use list::{NO_SLOWER, TARGETS};

impl Measure {
    /// The job in which two contestants are compared, and those.
    fn versus(self) -> Option<(&'static str, &'static str, &'static str)> {
        match self {
            Rate(job, of, over) | Time(job, of, over) | Cpu(job, of, over) | LayerNs(job, of, over, _) => {
                Some((job, of, over))
            }
            RateOfJobs(..) | CpuOfJobs(..) | CpuMs(..) | Rss(..) | Figure(..) => None,
        }
    }
}

impl Bound {
    /// Whether the median keeps it.
    pub(crate) fn holds(self, value: Spread) -> bool {
        match self {
            AtLeast(bound) => value.median >= bound,
            AtMost(bound) => value.median <= bound,
        }
    }

    /// With its sign.
    pub(crate) fn text(self) -> String {
        match self {
            AtLeast(bound) => format!("≥ {bound}"),
            AtMost(bound) => format!("≤ {bound}"),
        }
    }
}

/// A target with what was measured.
#[derive(Clone, Debug)]
pub(crate) struct Verdict {
    /// In the words of the table of targets.
    work: String,
    measure: Measure,
    bound: Bound,
    /// None: not measured here.
    pub(crate) value: Option<Spread>,
    /// CPU time in µs and system calls for a request, of both contestants where two are compared.
    costs: [String; 2],
}

impl Verdict {
    /// None: not measured.
    pub(crate) fn met(&self) -> Option<bool> {
        self.value.map(|value| self.bound.holds(value))
    }

    /// The earlier release takes part in it.
    pub(crate) fn needs_baseline(&self) -> bool {
        self.measure.versus().is_some_and(|(_, _, over)| lineup::is_earlier(over))
    }

    /// Its line in the table of targets.
    pub(crate) fn line(&self) -> Vec<String> {
        let value = self.value.map_or("–".into(), |v| digits(v.median));
        let range = self.value.filter(|v| v.min < v.max);
        let range = range.map_or(String::new(), |v| format!("{}–{}", digits(v.min), digits(v.max)));
        let met = match self.met() {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "not measured",
        };
        let [cpu, syscalls] = self.costs.clone();
        vec![self.work.clone(), self.bound.text(), value, range, met.into(), cpu, syscalls]
    }

    /// For programs.
    pub(crate) fn json(&self) -> Value {
        let (at_least, at_most) = match self.bound {
            AtLeast(bound) => (Some(bound), None),
            AtMost(bound) => (None, Some(bound)),
        };
        json!({
            "work": self.work,
            "job": self.measure.versus().map(|(job, ..)| job),
            "at_least": at_least,
            "at_most": at_most,
            "value": self.value.map(Spread::json),
            "met": self.met(),
        })
    }
}

/// What the target of a ratio of rates is and whether it is met, to go behind the ratio; empty: there is none.
pub(crate) fn of_rate(verdicts: &[Verdict], job: &str, of: &str, over: &str) -> String {
    let mine = |v: &&Verdict| matches!(v.measure, Rate(j, o, p) if (j, o, p) == (job, of, over));
    let Some(verdict) = verdicts.iter().find(mine) else { return String::new() };
    let mark = if verdict.met() == Some(true) { '✓' } else { '✗' };
    format!(" {} {mark}", verdict.bound.text())
}

/// All targets, in their order, and behind them the rows that ran beside the earlier release.
pub(crate) fn verdicts(report: &Report) -> Vec<Verdict> {
    let verdict = |work: String, what: Measure, bound: Bound| Verdict {
        work,
        measure: what,
        bound,
        value: measure(report, what),
        costs: costs(report, what),
    };
    let listed = TARGETS.iter().map(|target| verdict(target.work.into(), target.measure, target.bound));
    let rows = against_earlier(report).map(|(job, of, over)| {
        let who = if of == "ours" { String::new() } else { format!("{of}, ") };
        verdict(format!("{job}, {who}earlier release"), Rate(job, of, over), AtLeast(NO_SLOWER))
    });
    listed.chain(rows).collect()
}

/// The rows in which the earlier release took part and for which the list has no bound of their own: id of the job, and
/// the contestants.
fn against_earlier(report: &Report) -> impl Iterator<Item = (&'static str, &'static str, &'static str)> {
    let listed = |row: (&str, &str, &str)| {
        TARGETS.iter().any(|target| matches!(target.measure, Rate(j, o, p) if (j, o, p) == row))
    };
    let pairs = report.sections.iter().flat_map(|section| {
        let pairs = section.contest.ratios.iter().filter(|(_, over)| lineup::is_earlier(over));
        pairs.flat_map(|&(of, over)| {
            // A contestant may be left out of some jobs.
            let rows = section.rows.iter().filter(move |row| row.ratio(of, over).is_some());
            rows.map(move |row| (row.job.id, of, over))
        })
    });
    pairs.filter(move |row| !listed(*row))
}

/// The costs behind a number, as [`Verdict`] has them; empty where it is not about two contestants.
fn costs(report: &Report, measure: Measure) -> [String; 2] {
    let Some((row, of, over)) =
        measure.versus().and_then(|(job, of, over)| Some((report.row(job)?, of, over)))
    else {
        return Default::default();
    };
    let both = |value: fn(&Cell) -> Option<f64>| {
        let texts = [of, over].map(|name| row.cell(name).and_then(value).map_or("–".into(), digits));
        if texts.iter().all(|text| text == "–") { String::new() } else { texts.join(" / ") }
    };
    [both(Cell::cpu_per_request), both(|cell| cell.syscalls)]
}

fn measure(report: &Report, measure: Measure) -> Option<Spread> {
    match measure {
        Rate(job, of, over) => report.row(job)?.ratio(of, over),
        Time(job, of, over) => report.row(job)?.ratio(over, of),
        Cpu(job, of, over) => report.row(job)?.cpu_ratio(of, over),
        RateOfJobs(name, of, over) => {
            report.row(of)?.cell(name)?.rates()?.over(report.row(over)?.cell(name)?.rates()?)
        }
        CpuOfJobs(name, of, over) => {
            let cpu = |job: &str| report.row(job)?.cell(name)?.cpu_per_request();
            Spread::single(cpu(of)? / cpu(over)?)
        }
        CpuMs(job, name) => Spread::single(report.row(job)?.cell(name)?.cpu_per_request()? / 1e3),
        LayerNs(job, with, without, layers) => {
            let cpu = |name: &str| report.row(job)?.cell(name)?.cpu_per_request();
            Spread::single((cpu(with)? - cpu(without)?) * 1e3 / f64::from(layers))
        }
        Rss(job, of, over) => {
            let section = report.sections.iter().find(|section| section.row(job).is_some())?;
            let rss = |name: &str| Some(section.memory_of(name)?.rss as f64);
            Spread::single(rss(of)? / rss(over)?)
        }
        Figure(id, name) => Spread::single(report.figure(id, name)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        contests::CONTESTS,
        jobs::Sample,
        report::{Row, Section},
    };

    #[test]
    fn bounds_have_a_direction() {
        let holds = |bound: Bound, value| bound.holds(Spread::single(value).unwrap());
        assert!(holds(AtLeast(2.0), 2.0) && !holds(AtLeast(2.0), 1.9));
        assert!(holds(AtMost(2.0), 1.9) && !holds(AtMost(2.0), 2.1));
    }

    #[test]
    fn targets_are_for_what_is_measured() {
        for target in TARGETS {
            let (jobs, names) = match target.measure {
                Rate(job, of, over)
                | Time(job, of, over)
                | Cpu(job, of, over)
                | Rss(job, of, over)
                | LayerNs(job, of, over, _) => (vec![job], vec![of, over]),
                RateOfJobs(name, of, over) | CpuOfJobs(name, of, over) => (vec![of, over], vec![name]),
                CpuMs(job, name) => (vec![job], vec![name]),
                Figure(id, _) => {
                    assert!(crate::figures::IDS.contains(&id), "{id}");
                    continue;
                }
            };
            for job in jobs {
                let contest = CONTESTS.iter().find(|c| c.jobs.iter().any(|j| j.id == job)).expect(job);
                let contest = lineup::lineup(contest, true, &[]);
                for name in &names {
                    assert!(contest.contestants.iter().any(|c| c.name == *name), "{job}: {name}");
                }
            }
        }
    }

    /// A report of one job, in which each of ours has twice the rate of its earlier release.
    fn beside_earlier(id: &str) -> Report {
        let contest = CONTESTS.iter().find(|c| c.jobs.iter().any(|j| j.id == id)).unwrap();
        let job = contest.jobs.iter().find(|job| job.id == id).unwrap();
        let mut section = Section::new(lineup::lineup(contest, true, &[]));
        let cells = section.contest.contestants.iter().map(|contestant| {
            let requests = if contestant.earlier { 1 } else { 2 };
            let samples = vec![Sample { requests, seconds: 1.0, ..Sample::default() }];
            let (name, ours) = (contestant.name, contestant.is_ours());
            Cell { name, ours, samples, syscalls: None, problem: None }
        });
        section.rows.push(Row { job, cells: cells.collect() });
        Report { sections: vec![section], ..Report::default() }
    }

    #[test]
    fn each_row_has_one_bar_against_the_earlier_release() {
        let bars = |id: &str| -> Vec<_> {
            let bars = verdicts(&beside_earlier(id)).into_iter().filter(Verdict::needs_baseline);
            bars.filter(|bar| bar.met() == Some(true)).map(|bar| (bar.work, bar.bound)).collect()
        };
        let [ours, third] = bars("cold-read-d64").try_into().unwrap();
        assert_eq!(ours, ("cold-read-d64, earlier release".into(), AtLeast(NO_SLOWER)));
        assert_eq!(third, ("cold-read-d64, five filters, earlier release".into(), AtLeast(NO_SLOWER)));
        let [(_, bound)] = bars("fuse-c-plugin-d16").try_into().unwrap();
        assert_eq!(bound, AtLeast(1.5));
    }

    #[test]
    fn nothing_measured_meets_nothing() {
        let verdicts = verdicts(&Report::default());
        assert_eq!(verdicts.len(), TARGETS.len());
        assert!(verdicts.iter().all(|verdict| verdict.met().is_none()));
    }
}
