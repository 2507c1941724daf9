//! Tables in Markdown that are also readable as they stand.

use std::fmt::Write;

/// Three significant figures or so.
pub(crate) fn digits(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// The first line is the head; numbers to the right.
pub(crate) fn table(lines: &[Vec<String>]) -> String {
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
    fn table_lines_are_equally_wide() {
        let text = table(&[vec!["µ".into(), "b".into()], vec!["long".into(), "12".into()]]);
        assert_eq!(text, "| µ    |  b |\n|------|---:|\n| long | 12 |\n");
    }

    #[test]
    fn figures_are_three() {
        assert_eq!([1.234, 12.34, 123.4, -12.34].map(digits), ["1.23", "12.3", "123", "-12.3"]);
    }
}
