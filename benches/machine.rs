//! Where, when and with what the numbers were taken.

use std::{
    collections::BTreeMap,
    fs, thread,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

use crate::{
    jobs::Plan,
    measure::SyscallTool,
    programs::{Programs, version},
};

/// See the module.
#[derive(Debug)]
pub(crate) struct Machine {
    /// One line: CPU, kernel, day.
    pub(crate) summary: String,
    /// The summary, how it was measured, and the programs.
    pub(crate) text: String,
    pub(crate) json: Value,
}

/// Looks at the machine.
pub(crate) fn describe(programs: &Programs, plan: &Plan<'_>) -> Machine {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown CPU", |(_, name)| name);
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let kernel = kernel.trim();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let date = date(now.as_secs() / 86_400);
    let earlier = programs.earlier.as_ref().and_then(|release| release.server.clone());
    let peers = [
        ("ours", &programs.ours.server),
        ("ours, mount", &programs.ours.mount),
        ("ours, earlier", &earlier),
        ("nbdkit", &programs.nbdkit),
        ("qemu-nbd", &programs.qemu_nbd),
        ("nbdfuse", &programs.nbdfuse),
        ("qemu-storage-daemon", &programs.qsd),
        ("fio", &programs.fio),
        ("nbdcopy", &programs.nbdcopy),
        ("nbdinfo", &programs.nbdinfo),
    ];
    let wanted = |(name, _): &(&str, _)| *name != "ours, earlier" || programs.earlier.is_some();
    let versions = peers.into_iter().filter(wanted).map(|(name, program)| {
        let known = program.as_deref().map(|p| version(p).unwrap_or_else(|| "no version".into()));
        (name, known.unwrap_or_else(|| "not installed".into()))
    });
    let versions: Vec<_> = versions.collect();
    let counted = plan.syscalls.as_ref().map_or("not counted: no perf or strace", SyscallTool::name);
    let summary = format!("{cpus} CPUs ({model}), Linux {kernel}, {date}");
    let window = plan.window.as_millis() as u64;
    let mut text = format!("{summary}; {} rounds of {window} ms; system calls: {counted}", plan.rounds);
    for (name, version) in &versions {
        text += &format!("\n{name}: {version}");
    }
    let json = json!({
        "cpus": cpus,
        "cpu": model,
        "kernel": kernel,
        "date": date,
        "rounds": plan.rounds,
        "window_ms": window,
        "syscalls_counted_by": counted,
        "versions": versions.into_iter().collect::<BTreeMap<_, _>>(),
    });
    Machine { summary, text, json }
}

/// A day since 1970-01-01 in the calendar.
fn date(mut day: u64) -> String {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 1;
    for days in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if day < days {
            break;
        }
        day -= days;
        month += 1;
    }
    format!("{year}-{month:02}-{:02}", day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_dates() {
        let known = [(0, "1970-01-01"), (364, "1970-12-31"), (11_016, "2000-02-29"), (20_513, "2026-03-01")];
        for (day, text) in known {
            assert_eq!(date(day), text);
        }
    }
}
