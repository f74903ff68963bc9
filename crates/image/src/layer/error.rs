//! Why a tar stream cannot be read.

use std::io;

/// Maximum consecutive extended headers before an entry: they count against no other limit, so a
/// stream of them would be read without end.
pub const MAX_EXTENSIONS: u32 = 16;

#[derive(Debug, thiserror::Error)]
pub enum TarError {
    #[error("cannot read the tar stream")]
    Read(#[from] io::Error),
    #[error("tar header has a wrong checksum")]
    BadChecksum,
    #[error("tar header has an invalid number in its field {0:?}")]
    BadNumber(&'static str),
    #[error("tar stream has a malformed pax header")]
    BadPax,
    #[error("tar stream has a malformed sparse file")]
    BadSparse,
    #[error("tar stream has an extended header of {size} bytes, more than {limit}")]
    HeaderTooLarge { size: u64, limit: u64 },
    #[error("tar stream has more than {MAX_EXTENSIONS} extended headers before one entry")]
    TooManyExtensions,
    #[error("tar stream ends inside an entry")]
    Truncated,
    #[error("tar stream continues after a lone zero block")]
    LoneZeroBlock,
    #[error("tar stream has an entry of unknown type {0:?}")]
    UnknownType(char),
}
