//! What a guest may cache of a share, according to the share's name.

use std::ffi::CStr;
use std::time::Duration;

use vmm_api::shares;

/// Cache timeout of names and attributes; also the delay until the guest sees a change by the host.
pub(super) const CACHE_TIMEOUT: Duration = Duration::from_secs(1);
/// The same for shares that only this guest changes.
const EXCLUSIVE_TIMEOUT: Duration = Duration::from_secs(60);

/// What the guest may cache of a file: the least that a share permits through which it was found.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Caching {
    /// Nothing.
    Strict,
    #[default]
    Usual,
    Exclusive,
}

impl Caching {
    pub(super) fn timeout(self) -> Duration {
        match self {
            Self::Strict => Duration::ZERO,
            Self::Usual => CACHE_TIMEOUT,
            Self::Exclusive => EXCLUSIVE_TIMEOUT,
        }
    }
}

/// What may be cached of a share, according to its name, and the rest of the name.
pub(super) fn caching(name: &CStr) -> (Caching, &[u8]) {
    let name = name.to_bytes();
    if let Some(rest) = name.strip_suffix(shares::STRICT.as_bytes()) {
        (Caching::Strict, rest)
    } else if let Some(rest) = name.strip_suffix(shares::EXCLUSIVE.as_bytes()) {
        (Caching::Exclusive, rest)
    } else {
        (Caching::Usual, name)
    }
}

/// Whether later mounts of the host appear in the share, according to its name.
pub(super) fn follows(name: &CStr) -> bool {
    caching(name).1.ends_with(shares::FOLLOWS.as_bytes())
}
