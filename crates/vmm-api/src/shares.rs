//! What the host asks of a running `nacelle-fs`: which mounts it serves to its guest.
//!
//! The same packets as the VMM's control socket ([`crate::transport`]). A share is a mount that the
//! daemon has made (a folder or a file, with the flags it is to have) and hands over as a descriptor;
//! the guest sees it below the file system's root under its name.

use serde::{Deserialize, Serialize};

/// Most shares of a guest; a kubelet's pod has a handful.
pub const SHARES_MAX: usize = 256;
/// Longest name, bytes.
pub const NAME_MAX: usize = 64;

/// How the name of a share ends of which the guest is to cache nothing.
pub const STRICT: &str = ".strict";

/// Whether a share can have this name: one component of a path, and no surprise in a log.
pub fn is_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('.')
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Serves the detached mount (open_tree(2)) that comes with the packet.
    Add {
        name: String,
    },
    /// Takes a share away; open files of the guest's stay usable until it closes them.
    Remove {
        name: String,
    },
    List,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    Done,
    Shares { names: Vec<String> },
    Error(Error),
}

/// Why a request was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Error {
    #[error("share {name:?} exists already")]
    Exists { name: String },
    #[error("no share {name:?}")]
    NoSuchShare { name: String },
    #[error("{name:?} is no name for a share")]
    Name { name: String },
    #[error("share {name:?} is neither a folder nor a regular file")]
    Kind { name: String },
    #[error("there are {limit} shares already")]
    Full { limit: usize },
    #[error("packet carries {got} descriptors, {want} expected")]
    Descriptors { got: usize, want: usize },
    #[error("{message}")]
    Failed { message: String },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_plain_component() {
        for good in ["a", "pvc-1_2.x", &"x".repeat(NAME_MAX)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", ".", "..", ".x", "a/b", "a b", "ä", "a\0", &"x".repeat(NAME_MAX + 1)] {
            assert!(!is_name(bad), "{bad:?}");
        }
    }
}
