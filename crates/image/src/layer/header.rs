//! One 512-byte tar header: ustar, GNU and old V7 (POSIX.1-2017, pax, "ustar Interchange Format").
//!
//! Fields are decoded by the `tar` crate. The stream is read by `archive.rs`, because the crate
//! reads long names and pax headers into memory without a limit and has no pax sparse files.

use tar::{EntryType, Header};

use super::error::TarError;

/// A header's fields before extensions are applied.
#[derive(Debug)]
pub struct RawHeader {
    header: Header,
}

impl RawHeader {
    /// `None` for the zero block that ends an archive.
    pub fn parse(block: &[u8; 512]) -> Result<Option<Self>, TarError> {
        if block.iter().all(|&b| b == 0) {
            return Ok(None);
        }
        let mut header = Header::new_old();
        header.as_mut_bytes().copy_from_slice(block);
        let stored = header.cksum().map_err(|_| TarError::BadChecksum)?;
        let sum: u32 = block[..148].iter().chain(&block[156..]).map(|&b| u32::from(b)).sum();
        // The checksum field itself counts as eight spaces.
        if sum + 8 * 32 != stored {
            return Err(TarError::BadChecksum);
        }
        Ok(Some(Self { header }))
    }

    pub fn kind(&self) -> EntryType {
        self.header.entry_type()
    }

    pub fn path(&self) -> Vec<u8> {
        self.header.path_bytes().into_owned()
    }

    pub fn link(&self) -> Vec<u8> {
        self.header.link_name_bytes().map(|name| name.into_owned()).unwrap_or_default()
    }

    pub fn size(&self) -> Result<u64, TarError> {
        field(&self.header.as_old().size, "size", || self.header.entry_size())
    }

    pub fn mode(&self) -> Result<u16, TarError> {
        let mode = field(&self.header.as_old().mode, "mode", || self.header.mode())?;
        Ok((mode & 0o7777) as u16)
    }

    pub fn uid(&self) -> Result<u64, TarError> {
        field(&self.header.as_old().uid, "uid", || self.header.uid())
    }

    pub fn gid(&self) -> Result<u64, TarError> {
        field(&self.header.as_old().gid, "gid", || self.header.gid())
    }

    pub fn mtime(&self) -> i64 {
        // An invalid time is not a reason to refuse a file.
        self.header.mtime().ok().and_then(|t| i64::try_from(t).ok()).unwrap_or(0)
    }

    /// Major and minor of a device node.
    pub fn device(&self) -> Result<(u32, u32), TarError> {
        // At the same offsets in ustar and GNU headers.
        let [major, minor] = [&self.header.as_bytes()[329..337], &self.header.as_bytes()[337..345]];
        let major = field(major, "major", || self.header.device_major())?;
        let minor = field(minor, "minor", || self.header.device_minor())?;
        Ok((major.unwrap_or(0), minor.unwrap_or(0)))
    }

    /// Real size and first part of the map of an old GNU sparse file; the flag says whether more
    /// map blocks follow.
    pub fn gnu_sparse(&self) -> Result<(u64, Vec<u64>, bool), TarError> {
        let gnu = self.header.as_gnu().ok_or(TarError::BadSparse)?;
        let size = gnu.real_size().map_err(|_| TarError::BadSparse)?;
        let mut map = Vec::new();
        for part in &gnu.sparse {
            if part.is_empty() {
                break;
            }
            map.push(part.offset().map_err(|_| TarError::BadSparse)?);
            map.push(part.length().map_err(|_| TarError::BadSparse)?);
        }
        Ok((size, map, gnu.is_extended()))
    }
}

/// A number; an empty field counts as the default, as some writers leave unused fields empty.
fn field<T: Default>(
    bytes: &[u8],
    name: &'static str,
    parse: impl FnOnce() -> std::io::Result<T>,
) -> Result<T, TarError> {
    if bytes.iter().all(|b| matches!(b, 0 | b' ')) {
        return Ok(T::default());
    }
    parse().map_err(|_| TarError::BadNumber(name))
}
