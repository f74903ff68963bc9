//! Extended headers of tar entries: pax (POSIX.1-2017, pax, "pax Extended Header") with the
//! extensions that layers use: `SCHILY.xattr.*` and GNU's sparse maps.

use std::collections::BTreeMap;

use super::error::TarError;

/// Maximum number of keys in one header: limits the map's memory.
const MAX_RECORDS: usize = 16 * 1024;

/// Values of an extended header for the entry that follows.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pax {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u64>,
    pub gid: Option<u64>,
    pub mtime: Option<(i64, u32)>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub sparse: Sparse,
}

/// GNU sparse keys (formats 0.0, 0.1 and 1.0).
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Sparse {
    pub major: Option<u64>,
    pub minor: Option<u64>,
    pub name: Option<Vec<u8>>,
    pub real_size: Option<u64>,
    /// Alternating offsets and lengths.
    pub map: Vec<u64>,
}

impl Pax {
    /// Parses the records `"<length> <key>=<value>\n"`.
    pub fn parse(mut bytes: &[u8]) -> Result<Self, TarError> {
        let bad = || TarError::BadPax;
        let mut pax = Self::default();
        let mut records = 0;
        while !bytes.is_empty() && bytes[0] != 0 {
            records += 1;
            if records > MAX_RECORDS {
                return Err(bad());
            }
            let space = bytes.iter().take(20).position(|&b| b == b' ').ok_or_else(bad)?;
            let length = number(&bytes[..space]).ok_or_else(bad)?;
            let length = usize::try_from(length).map_err(|_| bad())?;
            if length <= space + 1 || length > bytes.len() || bytes[length - 1] != b'\n' {
                return Err(bad());
            }
            let record = &bytes[space + 1..length - 1];
            bytes = &bytes[length..];
            let equals = record.iter().position(|&b| b == b'=').ok_or_else(bad)?;
            pax.set(&record[..equals], &record[equals + 1..])?;
        }
        Ok(pax)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        let bad = || TarError::BadPax;
        // An empty value removes the key (POSIX.1-2017, pax).
        let bytes = || (!value.is_empty()).then(|| value.to_vec());
        let numeric = || match value {
            b"" => Ok(None),
            value => number(value).map(Some).ok_or_else(bad),
        };
        match key {
            b"path" => self.path = bytes(),
            b"linkpath" => self.link = bytes(),
            b"size" => self.size = numeric()?,
            b"uid" => self.uid = numeric()?,
            b"gid" => self.gid = numeric()?,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(time(value).ok_or_else(bad)?),
            b"GNU.sparse.major" => self.sparse.major = numeric()?,
            b"GNU.sparse.minor" => self.sparse.minor = numeric()?,
            b"GNU.sparse.name" => self.sparse.name = bytes(),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.real_size = numeric()?,
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                self.sparse.map.push(number(value).ok_or_else(bad)?);
            }
            b"GNU.sparse.map" => {
                let numbers = value.split(|&b| b == b',').map(number);
                self.sparse.map = numbers.collect::<Option<_>>().ok_or_else(bad)?;
            }
            key => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.insert(name.to_vec(), value.to_vec());
                }
            }
        }
        Ok(())
    }
}

/// A decimal number without sign.
pub fn number(text: &[u8]) -> Option<u64> {
    let plain = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| plain)?.parse().ok()
}

/// Decimal seconds with an optional fraction and sign, as whole seconds (rounded down) and
/// nanoseconds.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |&b| b == b'.');
    let seconds = i64::try_from(number(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanos = digits.fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    Some(match (negative, nanos) {
        (false, nanos) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        (true, nanos) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_round_down() {
        assert_eq!(time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"-3"), Some((-3, 0)));
        assert_eq!(time(b"1.1234567899"), Some((1, 123_456_789)));
        assert_eq!(time(b"1.x"), None);
        assert_eq!(time(b""), None);
    }

    #[test]
    fn records_with_wrong_lengths_are_refused() {
        assert_eq!(Pax::parse(b"11 path=ab\n").unwrap().path.unwrap(), b"ab");
        for bad in [&b"12 path=ab\n"[..], b"10 path=ab\n", b"path=ab\n", b"99 path=ab\n", b"0 x=\n"]
        {
            assert!(Pax::parse(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn an_attribute_may_hold_any_bytes() {
        let pax = Pax::parse(b"34 SCHILY.xattr.user.a=x\n=\0y\xff zzz\n").unwrap();
        assert_eq!(pax.xattrs[&b"user.a"[..]], b"x\n=\0y\xff zzz");
    }
}
