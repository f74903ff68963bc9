//! The end of the log of a pod's VMM or agent, for errors.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::handle::Paths;
use crate::vmm;

/// Bytes read from the end of a log, more than is shown.
const LOG_TAIL: usize = 4 << 10;

/// The end of the log of a VMM that wrote no status, or of a host pod's agent.
pub(super) fn log_tail(paths: &Paths) -> String {
    let text = read_tail(&paths.log, LOG_TAIL).unwrap_or_default();
    let text = vmm::clean(&String::from_utf8_lossy(&text), 1024);
    if text.is_empty() { String::new() } else { format!("; log: {text}") }
}

/// The last bytes of a file of any size.
fn read_tail(path: &Path, limit: usize) -> std::io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(limit as u64);
    let mut bytes = vec![0; limit];
    let len = file.read_at(&mut bytes, start)?;
    bytes.truncate(len);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_a_long_log_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm.log");
        assert!(read_tail(&path, 8).is_err());
        for (text, end) in [("", ""), ("short", "short"), ("a line\nlast one", "last one")] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(read_tail(&path, 8).unwrap(), end.as_bytes());
        }
    }
}
