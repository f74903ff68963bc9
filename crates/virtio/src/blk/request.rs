//! Parses a block request and checks it against the disk (virtio 1.2, section 5.2.6).

use vm_memory::GuestMemoryMmap;

use super::spec::{
    HEADER_LEN, ID_LEN, RANGE_LEN, RANGE_UNMAP, SECTOR, Status, T_DISCARD, T_FLUSH, T_GET_ID, T_IN,
    T_OUT, T_WRITE_ZEROES,
};
use crate::chain::{Buffer, Chain};

/// Most data bytes in a request.
/// Attack: a few requests of gigabytes occupy disk and page cache for seconds.
pub(super) const MAX_DATA: usize = 64 << 20;
/// Most sectors in a discard or write-zeroes request: 2 GiB, so that other requests run in between.
pub(super) const MAX_RANGE_SECTORS: u32 = 1 << 22;

/// Properties of the disk that requests are checked against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// In [`SECTOR`]s.
    pub(super) capacity: u64,
    pub(super) read_only: bool,
}

/// A checked operation; offsets and lengths are bytes within the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Operation {
    Read { offset: u64, data: Buffer },
    Write { offset: u64, data: Buffer },
    Flush,
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64, unmap: bool },
    GetId { data: Buffer },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum RequestError {
    #[error("request has no status byte")]
    NoStatus,
    #[error("request header has {len} of {HEADER_LEN} bytes")]
    ShortHeader { len: usize },
    #[error("request type {kind} is not supported")]
    Unsupported { kind: u32 },
    #[error("{len} data bytes are not whole sectors, or over the limit of {MAX_DATA}")]
    BadLength { len: usize },
    #[error("{len} bytes at sector {sector} reach past the end at sector {capacity}")]
    PastEnd { sector: u64, len: u64, capacity: u64 },
    #[error("disk is read-only")]
    ReadOnly,
    #[error("range of {sectors} sectors is over the limit of {MAX_RANGE_SECTORS}")]
    LongRange { sectors: u32 },
    #[error("range flags {flags:#x} are not supported")]
    RangeFlags { flags: u32 },
    #[error("buffer for the device id has {len} of {ID_LEN} bytes")]
    ShortId { len: usize },
}

impl RequestError {
    /// The status byte of the answer.
    pub(super) fn status(self) -> Status {
        match self {
            Self::Unsupported { .. } | Self::RangeFlags { .. } => Status::Unsupported,
            Self::NoStatus
            | Self::ShortHeader { .. }
            | Self::BadLength { .. }
            | Self::PastEnd { .. }
            | Self::ReadOnly
            | Self::LongRange { .. }
            | Self::ShortId { .. } => Status::IoError,
        }
    }
}

/// Splits the writable part into data and the last byte, which takes the status.
pub(super) fn split_status(chain: &Chain) -> Result<(Buffer, Buffer), RequestError> {
    let len = chain.writable.len().checked_sub(1).ok_or(RequestError::NoStatus)?;
    Ok(chain.writable.split_at(len))
}

/// Parses a chain whose status byte has been split off `writable`.
pub(super) fn parse(
    mem: &GuestMemoryMmap,
    readable: &Buffer,
    writable: Buffer,
    limits: Limits,
) -> Result<Operation, RequestError> {
    let mut header = [0; HEADER_LEN];
    let len = readable.read(mem, 0, &mut header);
    if len < HEADER_LEN {
        return Err(RequestError::ShortHeader { len });
    }
    let (_, payload) = readable.split_at(HEADER_LEN);
    let kind = word(&header, 0);
    let sector = u64::from(word(&header, 8)) | u64::from(word(&header, 12)) << 32;
    let may_write = || if limits.read_only { Err(RequestError::ReadOnly) } else { Ok(()) };
    match kind {
        T_IN => {
            let offset = data_range(sector, writable.len(), limits)?;
            Ok(Operation::Read { offset, data: writable })
        }
        T_OUT => {
            may_write()?;
            let offset = data_range(sector, payload.len(), limits)?;
            Ok(Operation::Write { offset, data: payload })
        }
        T_FLUSH => Ok(Operation::Flush),
        T_GET_ID if writable.len() < ID_LEN => Err(RequestError::ShortId { len: writable.len() }),
        T_GET_ID => Ok(Operation::GetId { data: writable }),
        T_DISCARD | T_WRITE_ZEROES => {
            may_write()?;
            range_operation(mem, kind, &payload, limits)
        }
        kind => Err(RequestError::Unsupported { kind }),
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([0, 1, 2, 3].map(|n| bytes[at + n]))
}

/// Byte offset of a data transfer, whose length and range are checked.
fn data_range(sector: u64, len: usize, limits: Limits) -> Result<u64, RequestError> {
    if len == 0 || len > MAX_DATA || !(len as u64).is_multiple_of(SECTOR) {
        return Err(RequestError::BadLength { len });
    }
    within(sector, len as u64, limits)
}

fn within(sector: u64, len: u64, limits: Limits) -> Result<u64, RequestError> {
    let capacity = limits.capacity;
    match sector.checked_add(len / SECTOR) {
        Some(end) if end <= capacity => Ok(sector * SECTOR),
        _ => Err(RequestError::PastEnd { sector, len, capacity }),
    }
}

/// A discard or write-zeroes request; the configuration announces one range per request.
fn range_operation(
    mem: &GuestMemoryMmap,
    kind: u32,
    payload: &Buffer,
    limits: Limits,
) -> Result<Operation, RequestError> {
    let mut range = [0; RANGE_LEN];
    let len = payload.len();
    if len != RANGE_LEN || payload.read(mem, 0, &mut range) != RANGE_LEN {
        return Err(RequestError::BadLength { len });
    }
    let sector = u64::from(word(&range, 0)) | u64::from(word(&range, 4)) << 32;
    let (sectors, flags) = (word(&range, 8), word(&range, 12));
    // Section 5.2.6.2: a discard has no flags.
    let known = if kind == T_DISCARD { 0 } else { RANGE_UNMAP };
    if flags & !known != 0 {
        return Err(RequestError::RangeFlags { flags });
    }
    if sectors > MAX_RANGE_SECTORS {
        return Err(RequestError::LongRange { sectors });
    }
    let len = u64::from(sectors) * SECTOR;
    let offset = within(sector, len, limits)?;
    Ok(if kind == T_DISCARD {
        Operation::Discard { offset, len }
    } else {
        Operation::WriteZeroes { offset, len, unmap: flags & RANGE_UNMAP != 0 }
    })
}
