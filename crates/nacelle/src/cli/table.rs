//! Tables, and sizes and times in readable units.

use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

/// Length of ids in tables, as in crictl.
const SHORT_ID: usize = 13;

pub(super) fn short(id: &str) -> &str {
    let id = id.strip_prefix("sha256:").unwrap_or(id);
    id.get(..SHORT_ID).unwrap_or(id)
}

/// Columns as wide as their widest cell.
pub(super) fn print(head: &[&str], rows: &[Vec<String>]) -> io::Result<()> {
    io::stdout().lock().write_all(render(head, rows).as_bytes())
}

fn render(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.max().unwrap_or(0).max(head[column].chars().count())
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> =
            cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(padded.join("  ").trim_end());
        text.push('\n');
    };
    line(&mut head.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    text
}

pub(super) fn json(value: &serde_json::Value) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    out.write_all(b"\n")
}

/// `14.2 MiB`
pub(super) fn bytes(count: u64) -> String {
    let mut value = count as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") }
}

/// `3 min ago`, of a time in nanoseconds since 1970.
pub(super) fn ago(nanos: i64) -> String {
    if nanos <= 0 {
        return "-".into();
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    span(now.saturating_sub(nanos.unsigned_abs() / 1_000_000_000)) + " ago"
}

fn span(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![vec!["a".into(), "long cell".into()], vec!["wider".into(), "b".into()]];
        assert_eq!(render(&["X", "Y"], &rows), "X      Y\na      long cell\nwider  b\n");
    }

    #[test]
    fn sizes_and_times_are_short() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(5 << 30), "5.0 GiB");
        assert_eq!(span(119), "119 s");
        assert_eq!(span(7199), "119 min");
        assert_eq!(span(200_000), "2 days");
        assert_eq!(short("sha256:0123456789abcdef"), "0123456789abc");
        assert_eq!(short("abc"), "abc");
    }
}
