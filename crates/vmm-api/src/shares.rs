//! The control protocol of `nacelle-fs`: which mounts it serves to its guest.
//!
//! Packets are as on the VMM's control socket ([`crate::transport`]). A share is a mount of a
//! directory or a file that the daemon has created and passes as a file descriptor. The guest sees
//! it under its name in the root directory of the file system.
//!
//! Servers outlive the daemon, so a daemon may meet a server of the previous release:
//! [`Reply::Shares`] has its version.

use serde::{Deserialize, Serialize};

/// Most shares of a guest; a pod of a kubelet has a few.
pub const SHARES_MAX: usize = 256;
/// Longest name, bytes.
pub const NAME_MAX: usize = 64;

/// Request queues that a server of this release can serve; a VMM with fewer vCPUs offers fewer.
pub const REQUEST_QUEUES_MAX: u16 = 8;

/// Suffix of a share's name: the guest must not cache anything of it.
pub const STRICT: &str = ".strict";
/// Suffix of a share's name: only this guest changes its files, so the guest may cache names and
/// attributes for long. Servers that do not know it cache as usual.
pub const EXCLUSIVE: &str = ".exclusive";
/// Suffix of a share's name, possibly before one of the above: mounts that the host makes later below it
/// appear.
pub const FOLLOWS: &str = ".follows";

/// Whether this is a valid name of a share: one path component of ASCII letters, digits, `-`, `_`
/// and `.` that does not begin with `.`, up to [`NAME_MAX`] bytes.
pub fn is_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('.')
}

/// Version from which on the server manages the write protection of shares ([`Access`]), and one
/// file of the host is one inode in the guest, through whichever share it is reached.
pub const VERSION_ACCESS: u32 = 1;

/// What the users of a share may write to. If another share of the same guest has the same files,
/// the server write-protects those that neither may write to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Nothing, including mounts below it.
    ReadOnlyRecursive,
    /// Only mounts below it, if the host permits it.
    ReadOnly,
    ReadWrite,
    /// As the flags of the mount say; they are not changed.
    #[default]
    AsMounted,
}

impl Access {
    pub fn is_as_mounted(&self) -> bool {
        *self == Self::AsMounted
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Adds a share: the detached mount (open_tree(2)) that comes with the packet.
    Add {
        name: String,
        #[serde(default, skip_serializing_if = "Access::is_as_mounted")]
        access: Access,
    },
    /// Changes what the users of a share may write to.
    Access {
        name: String,
        access: Access,
    },
    /// Removes a share; open files of the guest stay usable until it closes them.
    Remove {
        name: String,
    },
    List,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    Done,
    Shares {
        names: Vec<String>,
        /// 0 from a server that has neither [`Access`] nor this field.
        #[serde(default)]
        version: u32,
    },
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
    #[error("{name:?} is not a valid name for a share")]
    Name { name: String },
    #[error("share {name:?} is neither a directory nor a regular file")]
    Kind { name: String },
    #[error("there are {limit} shares already, the limit")]
    Full { limit: usize },
    #[error("packet has {got} file descriptors, {want} expected")]
    Descriptors { got: usize, want: usize },
    #[error("{message}")]
    Failed { message: String },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_compatible_with_servers_of_version_0() {
        let old = r#"{"reply":"shares","names":["a"]}"#;
        let reply: Reply = serde_json::from_str(old).unwrap();
        assert_eq!(reply, Reply::Shares { names: vec!["a".into()], version: 0 });
        let add = Request::Add { name: "a".into(), access: Access::AsMounted };
        assert_eq!(serde_json::to_string(&add).unwrap(), r#"{"request":"add","name":"a"}"#);
    }

    #[test]
    fn a_valid_name_is_one_plain_path_component() {
        for good in ["a", "pvc-1_2.x", &"x".repeat(NAME_MAX)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", ".", "..", ".x", "a/b", "a b", "ä", "a\0", &"x".repeat(NAME_MAX + 1)] {
            assert!(!is_name(bad), "{bad:?}");
        }
    }
}
