//! The console ring: a file of fixed size with the guest's console output. It has an 8-byte
//! little-endian count of all bytes ever written, then a ring of [`CAPACITY`] bytes with byte `n`
//! at `n % CAPACITY`.
//!
//! The VMM writes it, other processes read it; the file outlives both. A reader that races with the
//! writer may see overwritten bytes at the old end, never at the new one.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of console output in the ring.
pub const CAPACITY: u64 = 256 << 10;
const HEADER: u64 = 8;
/// Size of the file, bytes.
pub const FILE_SIZE: u64 = HEADER + CAPACITY;

/// Writes the ring; used by the VMM.
#[derive(Debug)]
pub struct Writer {
    file: File,
    written: u64,
}

impl Writer {
    /// Opens the ring in `file`, which may be empty or have earlier output.
    pub fn new(file: File) -> io::Result<Self> {
        file.set_len(FILE_SIZE)?;
        let written = read_count(&file)?;
        Ok(Self { file, written })
    }

    /// Appends `bytes`; only their last [`CAPACITY`] bytes are kept.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let skip = bytes.len().saturating_sub(CAPACITY as usize);
        let mut position = self.written + skip as u64;
        let mut rest = &bytes[skip..];
        while !rest.is_empty() {
            let at = position % CAPACITY;
            let len = rest.len().min((CAPACITY - at) as usize);
            self.file.write_all_at(&rest[..len], HEADER + at)?;
            position += len as u64;
            rest = &rest[len..];
        }
        self.written = position;
        self.file.write_all_at(&position.to_le_bytes(), 0)
    }

    /// The last `limit` bytes of output.
    pub fn tail(&self, limit: usize) -> io::Result<Vec<u8>> {
        read(&self.file, self.written.saturating_sub(limit as u64)).map(|(bytes, _)| bytes)
    }
}

fn read_count(file: &File) -> io::Result<u64> {
    let mut count = [0; 8];
    match file.read_exact_at(&mut count, 0) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
        other => other.map(|()| u64::from_le_bytes(count)),
    }
}

/// The output from position `from` on (or from the oldest byte in the ring), and the position after
/// it, which is the next `from` of a reader that follows the output. Positions count all bytes ever
/// written.
pub fn read(file: &File, from: u64) -> io::Result<(Vec<u8>, u64)> {
    let end = read_count(file)?;
    let start = from.max(end.saturating_sub(CAPACITY)).min(end);
    let mut out = vec![0; (end - start) as usize];
    let mut done = 0;
    while done < out.len() {
        let at = (start + done as u64) % CAPACITY;
        let len = (out.len() - done).min((CAPACITY - at) as usize);
        file.read_exact_at(&mut out[done..done + len], HEADER + at)?;
        done += len;
    }
    Ok((out, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_longer_than_the_ring_keeps_its_end() {
        let file = tempfile::tempfile().unwrap();
        let mut ring = Writer::new(file.try_clone().unwrap()).unwrap();
        for n in 0..40_000u32 {
            ring.write(format!("line {n}\n").as_bytes()).unwrap();
        }
        let (bytes, end) = read(&file, 0).unwrap();
        assert_eq!(bytes.len() as u64, CAPACITY);
        assert!(bytes.ends_with(b"line 39999\n"));
        assert_eq!(read(&file, end).unwrap(), (vec![], end));
        assert_eq!(ring.tail(6).unwrap(), b"39999\n");
    }

    #[test]
    fn a_second_writer_appends_to_the_output_of_the_first() {
        let file = tempfile::tempfile().unwrap();
        Writer::new(file.try_clone().unwrap()).unwrap().write(b"one ").unwrap();
        Writer::new(file.try_clone().unwrap()).unwrap().write(b"two").unwrap();
        assert_eq!(read(&file, 0).unwrap().0, b"one two");
    }
}
