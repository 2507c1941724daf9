//! What this project wants to reach, and whether it does. [`list`] has the numbers.

mod list;

use serde_json::{Value, json};

use crate::{jobs::Cell, report::Report, spread::Spread, table::digits};

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
use list::TARGETS;

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
    pub(crate) target: &'static Target,
    /// None: not measured here.
    pub(crate) value: Option<Spread>,
    /// CPU time in µs and system calls for a request, of both contestants where two are compared.
    costs: [String; 2],
}

impl Verdict {
    /// None: not measured.
    pub(crate) fn met(&self) -> Option<bool> {
        self.value.map(|value| self.target.bound.holds(value))
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
        vec![self.target.work.into(), self.target.bound.text(), value, range, met.into(), cpu, syscalls]
    }

    /// For programs.
    pub(crate) fn json(&self) -> Value {
        let (at_least, at_most) = match self.target.bound {
            AtLeast(bound) => (Some(bound), None),
            AtMost(bound) => (None, Some(bound)),
        };
        json!({
            "work": self.target.work,
            "job": self.target.measure.versus().map(|(job, ..)| job),
            "at_least": at_least,
            "at_most": at_most,
            "value": self.value.map(Spread::json),
            "met": self.met(),
        })
    }
}

/// What the target of a ratio of rates is and whether it is met, to go behind the ratio; empty: there is none.
pub(crate) fn of_rate(verdicts: &[Verdict], job: &str, of: &str, over: &str) -> String {
    let mine = |v: &&Verdict| matches!(v.target.measure, Rate(j, o, p) if (j, o, p) == (job, of, over));
    let Some(verdict) = verdicts.iter().find(mine) else { return String::new() };
    let mark = if verdict.met() == Some(true) { '✓' } else { '✗' };
    format!(" {} {mark}", verdict.target.bound.text())
}

/// All targets, in their order.
pub(crate) fn verdicts(report: &Report) -> Vec<Verdict> {
    let verdict = |target: &'static Target| Verdict {
        target,
        value: measure(report, target.measure),
        costs: costs(report, target.measure),
    };
    TARGETS.iter().map(verdict).collect()
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
    use crate::contests::CONTESTS;

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
                for name in &names {
                    assert!(contest.contestants.iter().any(|c| c.name == *name), "{job}: {name}");
                }
            }
        }
    }

    #[test]
    fn nothing_measured_meets_nothing() {
        let verdicts = verdicts(&Report::default());
        assert_eq!(verdicts.len(), TARGETS.len());
        assert!(verdicts.iter().all(|verdict| verdict.met().is_none()));
    }
}
