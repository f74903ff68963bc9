//! What the host asks of a running `nacelle-fs`: which mounts it serves to its guest.
//!
//! The same packets as the VMM's control socket ([`crate::transport`]). A share is a mount that the
//! daemon has made (a folder or a file) and hands over as a descriptor; the guest sees it below the
//! file system's root under its name.
//!
//! Servers outlive the daemon, so a daemon meets those of the release before: [`Reply::Shares`] says
//! what a server can do.

use serde::{Deserialize, Serialize};

/// Most shares of a guest; a kubelet's pod has a handful.
pub const SHARES_MAX: usize = 256;
/// Longest name, bytes.
pub const NAME_MAX: usize = 64;

/// Request queues that a server of this release can serve; a VMM with fewer vCPUs offers fewer.
pub const REQUEST_QUEUES_MAX: u16 = 8;

/// How the name of a share ends of which the guest is to cache nothing.
pub const STRICT: &str = ".strict";
/// How the name of a share ends, or goes on with [`STRICT`], in which the host's later mounts appear.
pub const FOLLOWS: &str = ".follows";

/// Whether a share can have this name: one component of a path, and no surprise in a log.
pub fn is_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('.')
}

/// The server keeps the shares' write protection itself ([`Access`]), and one host file is one file
/// of the guest whichever share leads to it.
pub const VERSION_ACCESS: u32 = 1;

/// What the users of a share may write to. Where another share of the same guest leads to the same
/// files, the server protects what neither may write to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Nothing, with all that is mounted below.
    ReadOnlyRecursive,
    /// What is mounted below, as far as the host lets them.
    ReadOnly,
    ReadWrite,
    /// The mount's own flags say it, for good.
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
    /// Serves the detached mount (open_tree(2)) that comes with the packet.
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
    Shares {
        names: Vec<String>,
        /// 0 is a server that knows neither [`Access`] nor this field.
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
    fn a_server_of_the_release_before_is_understood_and_understands() {
        let old = r#"{"reply":"shares","names":["a"]}"#;
        let reply: Reply = serde_json::from_str(old).unwrap();
        assert_eq!(reply, Reply::Shares { names: vec!["a".into()], version: 0 });
        let add = Request::Add { name: "a".into(), access: Access::AsMounted };
        assert_eq!(serde_json::to_string(&add).unwrap(), r#"{"request":"add","name":"a"}"#);
    }

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
