//! `nbdkit-bench load`: the load generator on any NBD server, with a report of rates and latencies.

use std::{fmt::Write, time::Duration};

use anyhow::{Context, Result, bail};
use clap::Parser;
use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::{Address, Clients, Content, Load, Mix, Op, Order, Outcome};

/// Puts a load on an NBD server and reports requests a second and latencies.
///
/// Writes and trims destroy what is on the disk.
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH, or just the path of a socket
    address: Address,
    /// Shares of reads, writes and trims
    #[arg(long, value_name = "KIND=SHARE,..", default_value = "read")]
    mix: Mix,
    /// Bytes a request: a number, with k or m for KiB or MiB
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = block)]
    block: usize,
    /// Requests in flight on each connection
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    depth: u16,
    /// Connections, each with a thread
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// Where the requests go
    #[arg(long, value_name = "ORDER", default_value = "random")]
    order: Order,
    /// How long, after a tenth of that for warming up
    #[arg(long, value_name = "S", default_value_t = 5.0)]
    seconds: f64,
    /// Ask for structured replies
    #[arg(long)]
    structured: bool,
    /// Show the distribution of latencies as bars too
    #[arg(long)]
    histogram: bool,
    /// Print JSON instead
    #[arg(long)]
    json: bool,
}

/// The largest request that every server takes.
const MOST: usize = 32 << 20;
const QUANTILES: [(&str, f64); 5] =
    [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)];
const BAR: u64 = 50;

fn block(text: &str) -> Result<usize> {
    let (number, unit) = match text.strip_suffix(['k', 'K']) {
        Some(number) => (number, 1 << 10),
        None => text.strip_suffix(['m', 'M']).map_or((text, 1), |number| (number, 1 << 20)),
    };
    let size = number.parse::<usize>().ok().and_then(|n| n.checked_mul(unit));
    match size.filter(|size| (1..=MOST).contains(size)) {
        Some(size) => Ok(size),
        None => bail!("a request has 1 byte to 32m"),
    }
}

/// Runs the command and returns what to print.
pub(crate) fn run(args: &Args) -> Result<String> {
    let (depth, connections) = (args.depth.into(), args.connections.into());
    let load = Load { mix: args.mix, order: args.order, block: args.block, depth, connections };
    let window = Duration::try_from_secs_f64(args.seconds).context("--seconds is not a time")?;
    let mut clients = Clients::connect(&args.address, connections, args.structured, Content::Unknown)?;
    clients.run(&load, window / 10)?;
    let outcome = clients.run(&load, window)?;
    if args.json {
        return Ok(format!("{:#}\n", report(&load, clients.size(), &outcome)?));
    }
    let mut text = table(&load, &outcome)?;
    if args.histogram {
        text.push('\n');
        text += &bars(&outcome.all()?);
    }
    Ok(text)
}

/// The kinds of requests that there were, and all together when those are several.
fn lines(outcome: &Outcome) -> Result<Vec<(&'static str, Histogram<u64>)>> {
    let each = Op::ALL.map(|op| (op.name(), outcome.latency(op).clone()));
    let mut lines: Vec<_> = each.into_iter().filter(|(_, latency)| !latency.is_empty()).collect();
    if lines.len() != 1 {
        lines.push(("all", outcome.all()?));
    }
    Ok(lines)
}

fn table(load: &Load, outcome: &Outcome) -> Result<String> {
    let mut text = format!("{:6} {:>11} {:>9} {:>9}", "", "requests/s", "MB/s", "mean µs");
    for (name, _) in QUANTILES {
        let _ = write!(text, " {name:>9}");
    }
    for (name, latency) in lines(outcome)? {
        let rate = latency.len() as f64 / outcome.elapsed.as_secs_f64();
        let megabytes = rate * load.block as f64 / 1e6;
        let _ = write!(text, "\n{name:6} {rate:>11.0} {megabytes:>9.1} {:>9.1}", latency.mean() / 1e3);
        for (_, quantile) in QUANTILES {
            let _ = write!(text, " {:>9.1}", latency.value_at_quantile(quantile) as f64 / 1e3);
        }
    }
    Ok(text + "\n")
}

/// How many requests took how long, in steps of twice as long.
fn bars(latency: &Histogram<u64>) -> String {
    let steps: Vec<_> = latency
        .iter_log(1000, 2.0)
        .map(|step| (step.value_iterated_to(), step.count_since_last_iteration()))
        .skip_while(|(_, count)| *count == 0)
        .collect();
    let most = steps.iter().map(|(_, count)| *count).max().unwrap_or(0).max(1);
    let mut text = String::new();
    for (up_to, count) in steps {
        let bar = "#".repeat((count * BAR).div_ceil(most) as usize);
        let _ = writeln!(text, "≤ {:>9.0} µs {count:>10} {bar}", up_to as f64 / 1e3);
    }
    text
}

fn report(load: &Load, size: u64, outcome: &Outcome) -> Result<Value> {
    let kinds = lines(outcome)?.into_iter().map(|(name, latency)| {
        let quantiles = QUANTILES.map(|(name, quantile)| {
            (name.to_owned(), json!(latency.value_at_quantile(quantile) as f64 / 1e3))
        });
        let value = json!({
            "requests": latency.len(),
            "rate": latency.len() as f64 / outcome.elapsed.as_secs_f64(),
            "mean_us": latency.mean() / 1e3,
            "latency_us": quantiles.into_iter().collect::<serde_json::Map<_, _>>(),
        });
        (name.to_owned(), value)
    });
    Ok(json!({
        "export_bytes": size,
        "request_bytes": load.block,
        "depth": load.depth,
        "connections": load.connections,
        "seconds": outcome.elapsed.as_secs_f64(),
        "requests": kinds.collect::<serde_json::Map<_, _>>(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_requests() {
        assert_eq!(["512", "4k", "32M"].map(|text| block(text).unwrap()), [512, 4096, 32 << 20]);
        for text in ["0", "", "k", "33m", "4kb", "-1", "99999999999999999999m"] {
            assert!(block(text).is_err(), "{text}");
        }
    }

    #[test]
    fn one_line_for_each_kind_and_one_for_all() {
        let mut outcome = Outcome::new().unwrap();
        outcome.elapsed = Duration::from_secs(2);
        let record = |outcome: &mut Outcome, op, us| outcome.record(op, Duration::from_micros(us));
        record(&mut outcome, Op::Read, 10);
        record(&mut outcome, Op::Read, 10);
        let names =
            |outcome: &Outcome| lines(outcome).unwrap().iter().map(|(name, _)| *name).collect::<Vec<_>>();
        assert_eq!(names(&outcome), ["read"]);
        record(&mut outcome, Op::Trim, 3000);
        assert_eq!(names(&outcome), ["read", "trim", "all"]);
        let load = Load { mix: Mix::READS, order: Order::Random, block: 1_000_000, depth: 1, connections: 1 };
        let text = table(&load, &outcome).unwrap();
        let read: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().take(3).collect();
        assert_eq!(read, ["read", "1", "1.0"]);
        assert_eq!(report(&load, 0, &outcome).unwrap()["requests"]["all"]["requests"], 3);
    }

    #[test]
    fn bars_are_as_long_as_counts() {
        let mut latency = Histogram::new_with_bounds(1, 1_000_000_000, 2).unwrap();
        latency.record_n(1500, 100).unwrap();
        latency.record_n(3000, 1).unwrap();
        let text = bars(&latency);
        let lengths: Vec<_> = text.lines().map(|line| line.matches('#').count()).collect();
        assert_eq!(lengths, [50, 1]);
    }
}
