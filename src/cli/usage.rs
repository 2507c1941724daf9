//! What the command line parser says: help, and errors on one line.

/// What was wrong with the command line, as one line that names the fix.
pub fn one_line(error: &clap::Error) -> anyhow::Error {
    let text = error.to_string();
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or("bad command line");
    let first = first.strip_prefix("error: ").unwrap_or(first);
    let details = lines
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .map(|line| line.strip_prefix("tip: ").unwrap_or(line))
        .filter(|line| !line.starts_with("to pass"))
        .fold(String::new(), |all, line| all + " " + line);
    anyhow::anyhow!("{first}{}{details} (see --help)", if details.is_empty() { "" } else { ";" })
}

/// The help text: options, examples, then `names`, the layers there are.
pub fn help(mut command: clap::Command, names: &str) -> String {
    format!("{}\n{names}\n", command.render_help())
}
