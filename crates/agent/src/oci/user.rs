//! Users of an image: resolves `user[:group]`, by name or number, with `/etc/passwd` and
//! `/etc/group` of the root file system (OCI image spec 1.1, config, `User`).

use std::path::Path;

use crate::error::{Error, Result};
use crate::guest::inroot::Root;

/// Maximum bytes read from each file, which the image chooses.
const MAX_FILE: u64 = 1 << 20;
/// Maximum supplementary groups (NGROUPS_MAX).
const MAX_GROUPS: usize = 65536;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    /// Groups that list the user as a member.
    pub additional: Vec<u32>,
}

/// Content of `/etc/passwd` and `/etc/group`.
#[derive(Debug, Default)]
pub struct Database {
    passwd: String,
    group: String,
}

struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl Database {
    pub fn read(root: &Root) -> Self {
        let read = |path| root.read(Path::new(path), MAX_FILE).unwrap_or_default();
        Self { passwd: read("/etc/passwd"), group: read("/etc/group") }
    }

    fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        self.passwd.lines().filter_map(|line| {
            let mut fields = line.split(':');
            Some(Entry {
                name: fields.next()?,
                uid: fields.nth(1)?.parse().ok()?,
                gid: fields.next()?.parse().ok()?,
                home: fields.nth(1).unwrap_or_default(),
            })
        })
    }

    /// Name, gid and member list of each group.
    fn groups(&self) -> impl Iterator<Item = (&str, u32, &str)> {
        self.group.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let gid = fields.nth(1)?.parse().ok()?;
            Some((name, gid, fields.next().unwrap_or_default()))
        })
    }

    /// Resolves `user[:group]`.
    pub fn resolve(&self, text: &str) -> Result<Identity> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (text, None),
        };
        // A number is always a uid, even if a user has it as a name: an image must not redirect a
        // pod's `runAsUser`. Same as containerd.
        let number = user.parse::<u32>().ok();
        let entry = self.entries().find(|entry| match number {
            Some(number) => entry.uid == number,
            None => entry.name == user,
        });
        let (uid, primary, name) = match (&entry, number) {
            (Some(entry), _) => (entry.uid, entry.gid, entry.name),
            (None, Some(uid)) => (uid, 0, ""),
            (None, None) if user.is_empty() => (0, 0, "root"),
            (None, None) => {
                return Err(Error::invalid(
                    "user",
                    format!("no user {user:?} in the image's /etc/passwd"),
                ));
            }
        };
        let additional = self.memberships(name);
        let Some(group) = group else { return Ok(Identity { uid, gid: primary, additional }) };
        let listed = || self.groups().find(|(name, ..)| *name == group).map(|(_, gid, _)| gid);
        let gid = group.parse::<u32>().ok().or_else(listed).ok_or_else(|| {
            Error::invalid("user", format!("no group {group:?} in the image's /etc/group"))
        })?;
        Ok(Identity { uid, gid, additional })
    }

    /// Groups that list the user with this uid as a member.
    pub fn groups_of(&self, uid: u32) -> Vec<u32> {
        let entry = self.entries().find(|entry| entry.uid == uid);
        entry.map(|entry| self.memberships(entry.name)).unwrap_or_default()
    }

    /// Groups that list the user as a member.
    fn memberships(&self, name: &str) -> Vec<u32> {
        if name.is_empty() {
            return Vec::new();
        }
        self.groups()
            .filter(|(_, _, members)| members.split(',').any(|member| member.trim() == name))
            .map(|(_, gid, _)| gid)
            .take(MAX_GROUPS)
            .collect()
    }

    /// The user's home directory; `/` if unknown.
    pub fn home(&self, uid: u32) -> &str {
        self.entries()
            .find(|entry| entry.uid == uid)
            .map(|entry| entry.home)
            .filter(|home| home.starts_with('/'))
            .unwrap_or("/")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database() -> Database {
        Database {
            passwd: "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:101:102::/srv/web:/bin/false\n\
                     77:x:1077:1078::/h:/x\n"
                .into(),
            group: "root:x:0:\nweb:x:102:\nlog:x:200:web,other\nnobody:x:65534:web\n".into(),
        }
    }

    fn identity(uid: u32, gid: u32, additional: &[u32]) -> Identity {
        Identity { uid, gid, additional: additional.to_vec() }
    }

    #[test]
    fn names_and_numbers_are_resolved_with_their_groups() {
        let database = database();
        for (text, want) in [
            ("web", identity(101, 102, &[200, 65534])),
            ("101", identity(101, 102, &[200, 65534])),
            ("web:log", identity(101, 200, &[200, 65534])),
            ("web:4242", identity(101, 4242, &[200, 65534])),
            ("0:0", identity(0, 0, &[])),
            ("5000", identity(5000, 0, &[])),
            ("5000:", identity(5000, 0, &[])),
            ("77", identity(77, 0, &[])),
            ("1077", identity(1077, 1078, &[])),
            (":log", identity(0, 200, &[])),
        ] {
            assert_eq!(database.resolve(text).unwrap(), want, "{text}");
        }
    }

    #[test]
    fn unknown_names_are_refused_by_name() {
        let error = database().resolve("nosuch").unwrap_err().to_string();
        assert!(error.contains("nosuch"), "{error}");
        let error = database().resolve("web:nosuch").unwrap_err().to_string();
        assert!(error.contains("nosuch"), "{error}");
    }

    #[test]
    fn a_missing_home_is_the_root_directory() {
        assert_eq!(database().home(101), "/srv/web");
        assert_eq!(database().home(4), "/");
        assert_eq!(Database::default().home(0), "/");
    }
}
