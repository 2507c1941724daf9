//! What the command line parser says: help, and errors on one line.

use std::fmt::Write as _;

use clap::{Arg, Command};
use nbdkit_core::{Chain, Info};
use nbdkit_loader::lookup::Kind;

use crate::{
    layers,
    parameters::{Parameter, Parameters},
};

/// Columns of the help. A terminal that is wider makes no difference: long lines are hard to read.
const WIDTH: usize = 80;
/// The column at which what a parameter is for begins, if what is before it is short enough.
const COLUMN: usize = 30;

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

/// `--help`: with a chain what its layers are and take, then the options by group; without one the plugins and filters
/// that there are.
pub fn help(mut command: Command, chain: Option<&Chain>) -> String {
    let options = command.render_help().to_string();
    match chain {
        Some(chain) => format!("{}\n{options}", of_layers(chain)),
        None => format!("{options}\n{}", layers::table()),
    }
}

/// `-h`: one screen, with the options of these names.
pub fn short_help(mut command: Command, options: &[&str], chain: Option<&Chain>) -> String {
    if let Some(chain) = chain {
        return of_layers(chain);
    }
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let mut text = format!("{about}.\n\n{}\n\n", command.render_usage());
    for name in options {
        if let Some(option) = command.get_arguments().find(|arg| arg.get_long() == Some(name)) {
            let what = option.get_help().map(ToString::to_string).unwrap_or_default();
            // Not more than the gist of it.
            let end = ["; ", " ("].iter().filter_map(|stop| what.find(stop)).min().unwrap_or(what.len());
            entry(&mut text, &option_usage(option), &what[..end]);
        }
    }
    text += "\nMore: --help for every option, --list for the plugins and filters there are,\n\
             PLUGIN --help for what one takes, and the manual pages.\n";
    text
}

/// An option as it is typed.
fn option_usage(option: &Arg) -> String {
    let short = option.get_short().map_or("    ".into(), |letter| format!("-{letter}, "));
    let value = option.get_action().takes_values().then(|| option.get_value_names()).flatten();
    let value = value.and_then(|names| names.first()).map(|name| format!(" <{name}>")).unwrap_or_default();
    format!("{short}--{}{value}", option.get_long().unwrap_or_default())
}

/// What the layers are and take, the outermost first.
fn of_layers(chain: &Chain) -> String {
    let infos = chain.infos();
    let mut text = String::new();
    for (i, info) in infos.iter().enumerate() {
        let kind = if i + 1 == infos.len() { Kind::Plugin } else { Kind::Filter };
        layer(&mut text, kind, info);
    }
    text
}

fn layer(text: &mut String, kind: Kind, info: &Info) {
    let summary = info.path.is_none().then(|| layers::summary_of(kind, info)).flatten();
    let what = summary.unwrap_or(&info.longname);
    if !text.is_empty() {
        text.push('\n');
    }
    let _ =
        writeln!(text, "{}: {}{}{what}", kind.name(), info.name, if what.is_empty() { "" } else { " - " });
    if !info.description.is_empty() {
        let _ = writeln!(text, "\n{}\n", info.description.trim_end());
    }
    if info.config_help.is_empty() {
        return;
    }
    // That of others is theirs: only what is bundled is known to have the form.
    if info.path.is_some() {
        let _ = writeln!(text, "{}", info.config_help.trim_end());
        return;
    }
    let parameters = Parameters::of(info);
    for parameter in &parameters.list {
        entry(text, &parameter.usage(), &sentence(parameter));
    }
    for note in &parameters.notes {
        text.push_str("  ");
        text.push_str(note);
        text.push('\n');
    }
}

/// What a parameter is for, with "(required)" at the end as a default would be.
fn sentence(parameter: &Parameter) -> String {
    let sentence = parameter.sentence();
    let sentence = sentence.trim_end_matches('.');
    let required = parameter.is_required() && !sentence.contains("(required");
    format!("{sentence}{}", if required { " (required)" } else { "" })
}

/// One option or parameter, and what it is for beside it, in columns.
fn entry(text: &mut String, usage: &str, what: &str) {
    let mut column = usage.chars().count() + 2;
    let _ = write!(text, "  {usage}");
    if column + 2 > COLUMN && !what.is_empty() {
        text.push('\n');
        column = 0;
    }
    for word in what.split_whitespace() {
        if column + 1 + word.chars().count() > WIDTH && column > COLUMN {
            text.push('\n');
            column = 0;
        }
        let blanks = if column < COLUMN { COLUMN - column } else { 1 };
        let _ = write!(text, "{:blanks$}{word}", "");
        column += blanks + word.chars().count();
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_no_longer_than_a_screen_is_wide() {
        let mut text = String::new();
        for name in nbdkit_filters::names() {
            layer(&mut text, Kind::Filter, &layers::info(Kind::Filter, name).unwrap());
        }
        for name in nbdkit_plugins::names() {
            layer(&mut text, Kind::Plugin, &layers::info(Kind::Plugin, name).unwrap());
        }
        let long: Vec<_> = text.lines().filter(|line| line.chars().count() > 100).collect();
        assert!(long.is_empty(), "{long:#?}");
        assert!(
            text.contains("filter: limit - limit how many clients are connected at once\n  limit=N "),
            "{text}"
        );
        assert!(text.contains("plugin: memory - a sparse disk in memory\n  [size=]SIZE"), "{text}");
    }

    #[test]
    fn one_style() {
        let mut text = String::new();
        entry(&mut text, "[size=]SIZE", "Size of the disk");
        entry(&mut text, "a-parameter-with-a-long-name=VALUE", &"word ".repeat(20));
        let second = format!("{:30}{}", "", "word ".repeat(10).trim_end());
        assert_eq!(
            text,
            format!(
                "  [size=]SIZE                 Size of the disk\n  a-parameter-with-a-long-name=VALUE\n{second}\n{second}\n"
            )
        );
    }
}
