//! A plain text table: first column left, the others right.

/// Prints a title, a header and rows of the same length.
pub fn print(title: &str, header: &[&str], rows: &[Vec<String>]) {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    println!("\n{title}");
    line(&widths, header.iter().map(ToString::to_string));
    for row in rows {
        line(&widths, row.iter().cloned());
    }
}

fn line(widths: &[usize], cells: impl Iterator<Item = String>) {
    let mut text = String::from("  ");
    for (at, (cell, width)) in cells.zip(widths).enumerate() {
        let padded = if at == 0 { format!("{cell:<width$}") } else { format!("  {cell:>width$}") };
        text.push_str(&padded);
    }
    println!("{}", text.trim_end());
}

/// Median of measurements; they are sorted in place.
pub fn median(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}
