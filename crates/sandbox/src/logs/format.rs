//! The CRI log format, one entry per line: `<RFC 3339 time> <stream> <tag> <text>`; tag `F` ends a
//! line, `P` is a part of one. Split as in containerd: a line of up to [`MAX_LINE`] bytes is one
//! entry, a longer one is split after each [`MAX_LINE`] bytes, a carriage return before a line feed
//! is dropped, and a last line without a line feed is partial.

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

/// Longest text of an entry, bytes. Output without a line feed is buffered up to this size.
pub(crate) const MAX_LINE: usize = 16 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tag {
    Full,
    Partial,
}

/// Splits one stream into entries.
#[derive(Debug, Default)]
pub(crate) struct LineSplitter {
    buffered: Vec<u8>,
}

impl LineSplitter {
    /// Received bytes that are in no entry yet.
    pub(crate) fn buffered(&self) -> usize {
        self.buffered.len()
    }

    pub(crate) fn push(&mut self, mut bytes: &[u8], mut entry: impl FnMut(Tag, &[u8])) {
        while let Some(at) = bytes.iter().position(|b| *b == b'\n') {
            self.take(&bytes[..at], &mut entry);
            let end = self.buffered.len() - usize::from(self.buffered.ends_with(b"\r"));
            self.split(end, &mut entry);
            let end = self.buffered.len() - usize::from(self.buffered.ends_with(b"\r"));
            entry(Tag::Full, &self.buffered[..end]);
            self.buffered.clear();
            bytes = &bytes[at + 1..];
        }
        self.take(bytes, &mut entry);
    }

    /// Buffers the line in chunks, so that a long line is never in memory as a whole.
    fn take(&mut self, mut bytes: &[u8], entry: &mut impl FnMut(Tag, &[u8])) {
        while !bytes.is_empty() {
            let chunk = bytes.len().min(MAX_LINE);
            self.buffered.extend_from_slice(&bytes[..chunk]);
            bytes = &bytes[chunk..];
            // A trailing carriage return is undecided until the next byte.
            let complete = self.buffered.len() - usize::from(self.buffered.ends_with(b"\r"));
            self.split(complete, entry);
        }
    }

    fn split(&mut self, mut complete: usize, entry: &mut impl FnMut(Tag, &[u8])) {
        while complete > MAX_LINE {
            entry(Tag::Partial, &self.buffered[..MAX_LINE]);
            self.buffered.drain(..MAX_LINE);
            complete -= MAX_LINE;
        }
    }

    /// Flushes at the end of the stream.
    pub(crate) fn finish(&mut self, mut entry: impl FnMut(Tag, &[u8])) {
        self.split(self.buffered.len(), &mut entry);
        if !self.buffered.is_empty() {
            entry(Tag::Partial, &self.buffered);
            self.buffered.clear();
        }
    }
}

/// Appends one entry.
pub(crate) fn write_entry(out: &mut Vec<u8>, at: SystemTime, stream: &str, tag: Tag, text: &[u8]) {
    write_time(out, at);
    let tag = match tag {
        Tag::Full => " F ",
        Tag::Partial => " P ",
    };
    out.push(b' ');
    out.extend_from_slice(stream.as_bytes());
    out.extend_from_slice(tag.as_bytes());
    out.extend_from_slice(text);
    out.push(b'\n');
}

/// RFC 3339 in UTC with up to nine decimals, without trailing zeros (Go's RFC3339Nano).
fn write_time(out: &mut Vec<u8>, at: SystemTime) {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = ((since.as_secs() / 86_400) as i64, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let _ = write!(out, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    if since.subsec_nanos() != 0 {
        let digits = format!("{:09}", since.subsec_nanos());
        out.push(b'.');
        out.extend_from_slice(digits.trim_end_matches('0').as_bytes());
    }
    out.push(b'Z');
}

/// Year, month and day of a day number since 1970-01-01, Gregorian calendar. Years start in March,
/// so that the leap day is the last day.
fn civil(days: i64) -> (i64, i64, i64) {
    const DAYS_400_YEARS: i64 = 146_097;
    let from_march_0000 = days + 719_468;
    let era = from_march_0000.div_euclid(DAYS_400_YEARS);
    let of_era = from_march_0000.rem_euclid(DAYS_400_YEARS);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (400 * era + year_of_era + next, month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn split_all(chunks: &[&[u8]], end: bool) -> Vec<(Tag, Vec<u8>)> {
        let mut splitter = LineSplitter::default();
        let mut out = Vec::new();
        for chunk in chunks {
            splitter.push(chunk, |tag, text| out.push((tag, text.to_vec())));
        }
        if end {
            splitter.finish(|tag, text| out.push((tag, text.to_vec())));
        }
        out
    }

    #[test]
    fn an_entry_has_the_exact_bytes() {
        let mut out = Vec::new();
        let at = UNIX_EPOCH + Duration::new(1_709_210_096, 120_300_000);
        write_entry(&mut out, at, "stdout", Tag::Full, b"hello world");
        assert_eq!(out, b"2024-02-29T12:34:56.1203Z stdout F hello world\n");
        out.clear();
        write_entry(&mut out, UNIX_EPOCH, "stderr", Tag::Partial, b"");
        assert_eq!(out, b"1970-01-01T00:00:00Z stderr P \n");
    }

    #[test]
    fn dates_around_leap_days_and_centuries_are_right() {
        for (days, date) in [
            (-1, (1969, 12, 31)),
            (0, (1970, 1, 1)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (20_819, (2027, 1, 1)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(civil(days), date, "day {days}");
        }
    }

    #[test]
    fn a_line_in_chunks_and_an_empty_line_are_one_entry_each() {
        let out = split_all(&[b"a", b"b\r", b"\n\nend"], true);
        assert_eq!(
            out,
            [(Tag::Full, b"ab".to_vec()), (Tag::Full, vec![]), (Tag::Partial, b"end".to_vec())]
        );
    }

    #[test]
    fn only_a_line_longer_than_the_limit_is_split() {
        let line = vec![b'x'; MAX_LINE];
        assert_eq!(split_all(&[&line, b"\r\n"], true), [(Tag::Full, line.clone())]);
        assert_eq!(
            split_all(&[&line, b"y\n"], true),
            [(Tag::Partial, line.clone()), (Tag::Full, b"y".to_vec())]
        );
        let endless = vec![b'x'; 3 * MAX_LINE];
        assert_eq!(split_all(&[&endless], false).len(), 2);
    }

    proptest::proptest! {
        #[test]
        fn no_byte_is_lost_however_the_stream_is_chunked(
            text in proptest::collection::vec(proptest::sample::select(b"ab\n".to_vec()), 0..200),
            cuts in proptest::collection::vec(0usize..200, 0..5),
        ) {
            let mut cuts: Vec<_> = cuts.into_iter().map(|c| c.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort();
            let chunks: Vec<&[u8]> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let out = split_all(&chunks, true);
            proptest::prop_assert_eq!(&out, &split_all(&[&text], true));
            let mut back = Vec::new();
            for (tag, text) in out {
                back.extend(text);
                if tag == Tag::Full { back.push(b'\n'); }
            }
            proptest::prop_assert_eq!(back, text);
        }
    }
}
