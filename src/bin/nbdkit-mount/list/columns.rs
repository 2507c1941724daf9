//! The listing for people: a table for each disk that fits the terminal.

use std::fmt::Write as _;

use nbdkit_common::{Content, Usage};

use super::{Disk, Listing, Volume};

const HEADINGS: [&str; 8] = ["FILE", "START", "SIZE", "TYPE", "NAME", "CONTENT", "LABEL", "UUID"];
/// Numbers are on the right.
const RIGHT: [bool; 8] = [false, true, true, false, false, false, false, false];
/// Between two columns.
const GAP: usize = 2;

/// What gives way where the table is too wide: a column gets this narrow, or goes, in this order.
const STEPS: [(usize, usize); 8] = [(3, 12), (4, 12), (6, 12), (1, 0), (4, 0), (3, 0), (7, 0), (6, 0)];

/// Columns of the terminal. None: standard output is none, and lines may be of any length.
pub(super) fn width() -> Option<usize> {
    if !std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        return None;
    }
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok();
    size.map(|size| usize::from(size.ws_col)).filter(|width| *width > 0).or(Some(80))
}

type Row = [String; 8];

impl Listing {
    /// A paragraph for each disk, and one for the volumes.
    pub(super) fn text(&self, width: Option<usize>) -> String {
        let mut text = String::new();
        for disk in &self.disks {
            if !text.is_empty() {
                text.push('\n');
            }
            line(&mut text, "", &disk.heading(), width);
            let rows: Vec<_> = disk.rows().collect();
            if !rows.is_empty() {
                table(&mut text, &rows, width);
            }
            for warning in &disk.survey.warnings {
                line(&mut text, "  ", &format!("warning: {warning}"), width);
            }
        }
        if !self.volumes.is_empty() {
            text += "\nLogical volumes\n";
            let rows: Vec<_> = self.volumes.iter().map(volume).collect();
            table(&mut text, &rows, width);
            for volume in &self.volumes {
                if let Some(why) = &volume.refused {
                    line(&mut text, "  ", &format!("{}: {why}", volume.device), width);
                }
            }
        }
        for warning in &self.warnings {
            line(&mut text, "", &format!("warning: {warning}"), width);
        }
        text
    }
}

impl Disk {
    fn heading(&self) -> String {
        let mut text = format!("{}: {}", printable(&self.file.to_string_lossy()), size(self.size));
        if let Some(format) = &self.format {
            let _ = write!(text, ", an image in the format {}", format.name);
        }
        if let Some(table) = &self.survey.table {
            let _ = write!(text, ", {}, sectors of {} bytes", table.scheme, table.sector_size);
            if let Some(uuid) = &table.uuid {
                let _ = write!(text, ", {uuid}");
            }
        }
        if let Some(content) = &self.survey.whole {
            let _ = write!(text, ", {}", describe(content));
            for (what, value) in [("label", &content.label), ("UUID", &content.uuid)] {
                if let Some(value) = value {
                    let _ = write!(text, ", {what} {}", printable(value));
                }
            }
        } else if self.survey.table.is_none() && self.format.is_none() {
            text += ", nothing that is known";
        }
        text
    }

    fn rows(&self) -> impl Iterator<Item = Row> + '_ {
        self.survey.partitions().map(|(partition, content)| {
            let within = partition.length_within(self.size);
            let file = nbdkit_fuse::partition_name(&self.file, partition.number);
            let kind = partition.kind.name().map_or_else(|| partition.kind.to_string(), String::from);
            row(
                [
                    if within > 0 { printable(&file.to_string_lossy()) } else { "-".into() },
                    size(partition.start),
                    if within == partition.length { size(within) } else { format!("{}!", size(within)) },
                    printable(&kind),
                    printable(&partition.name),
                ],
                content,
            )
        })
    }
}

fn volume(volume: &Volume) -> Row {
    let kind = if volume.refused.is_none() { "LVM2" } else { "LVM2, not read" };
    let name = format!("{}/{}", volume.group, volume.name);
    row([String::new(), String::new(), size(volume.size), kind.into(), name], volume.content.as_ref())
}

fn row([file, start, size, kind, name]: [String; 5], content: Option<&Content>) -> Row {
    let field = |value: Option<&String>| value.map(|value| printable(value)).unwrap_or_default();
    let label = field(content.and_then(|content| content.label.as_ref()));
    let uuid = field(content.and_then(|content| content.uuid.as_ref()));
    [file, start, size, kind, name, content.map(describe).unwrap_or_default(), label, uuid]
}

fn describe(content: &Content) -> String {
    let suffix = match content.usage {
        _ if content.needs_recovery => " (not clean)",
        Usage::Crypto => " (encrypted)",
        _ => "",
    };
    format!("{}{suffix}", content.kind)
}

/// A size as lsblk(8) writes it.
fn size(bytes: u64) -> String {
    let mut unit = 0;
    let mut whole = bytes;
    while whole >= 1024 && unit < 6 {
        whole /= 1024;
        unit += 1;
    }
    let suffix = ["B", "K", "M", "G", "T", "P", "E"][unit];
    let scale = 1u64 << (10 * unit);
    match (bytes - whole * scale) as u128 * 10 / u128::from(scale) {
        0 => format!("{whole}{suffix}"),
        tenth => format!("{whole}.{tenth}{suffix}"),
    }
}

/// What is on a disk may hold anything; a terminal gets none of its control characters.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn length(text: &str) -> usize {
    text.chars().count()
}

/// Prints rows under headings, without columns that are empty.
fn table(text: &mut String, rows: &[Row], width: Option<usize>) {
    let mut widths: [usize; 8] = std::array::from_fn(|column| {
        let widest = rows.iter().map(|row| length(&row[column])).max().unwrap_or(0);
        if widest == 0 { 0 } else { widest.max(HEADINGS[column].len()) }
    });
    let total = |widths: &[usize; 8]| {
        let used = widths.iter().filter(|width| **width > 0);
        used.map(|width| width + GAP).sum::<usize>()
    };
    for (column, least) in STEPS {
        let excess = width.map_or(0, |width| total(&widths).saturating_sub(width));
        if excess == 0 {
            break;
        }
        // A column that goes takes its gap with it.
        widths[column] = match least {
            0 => 0,
            least => widths[column].saturating_sub(excess).max(least).min(widths[column]),
        };
    }
    let headings = HEADINGS.map(String::from);
    for row in std::iter::once(&headings).chain(rows) {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate().filter(|(column, _)| widths[*column] > 0) {
            let width = widths[column];
            let cell = match length(cell) > width {
                true => cell.chars().take(width - 1).chain(['…']).collect(),
                false => cell.clone(),
            };
            line += "  ";
            let pad = " ".repeat(width - length(&cell));
            line += &if RIGHT[column] { pad + &cell } else { cell + &pad };
        }
        let line: String = line.trim_end().chars().take(width.unwrap_or(usize::MAX)).collect();
        text.push_str(&line);
        text.push('\n');
    }
}

/// Prints words, with a new line wherever the next does not fit, from the second on indented further.
fn line(text: &mut String, indent: &str, words: &str, width: Option<usize>) {
    let width = width.unwrap_or(usize::MAX);
    let mut used = 0;
    for word in words.split(' ') {
        if used > indent.len() && used + 1 + length(word) > width {
            text.push('\n');
            used = 0;
            text.push_str(indent);
            text.push_str("    ");
            used += indent.len() + 4;
        } else if used > 0 {
            text.push(' ');
            used += 1;
        } else {
            text.push_str(indent);
            used += indent.len();
        }
        text.push_str(word);
        used += length(word);
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in
            [(0, "0B"), (512, "512B"), (1536, "1.5K"), (1 << 20, "1M"), (1 << 40, "1T"), (u64::MAX, "15.9E")]
        {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn a_table_fits() {
        let row: Row = [
            "nbd1",
            "1M",
            "20.5G",
            "Linux root (x86-64)",
            "a very long name of a partition",
            "ext4",
            "a label that is long too",
            "0fc63daf-8483-4772-8e79-3d69d8477de4",
        ]
        .map(String::from);
        for width in 10..200 {
            let mut text = String::new();
            table(&mut text, std::slice::from_ref(&row), Some(width));
            assert!(text.lines().all(|line| length(line) <= width), "{width}: {text}");
            if width >= 40 {
                assert!(text.contains("nbd1") && text.contains("ext4"), "{width}: {text}");
            }
        }
    }

    #[test]
    fn long_lines_are_broken() {
        let mut text = String::new();
        line(&mut text, "  ", "one two three four", Some(12));
        assert_eq!(text, "  one two\n      three\n      four\n");
    }

    #[test]
    fn nothing_controls_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\nc"), "a\u{fffd}[2Jb\u{fffd}c");
    }
}
