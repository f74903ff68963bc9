//! Initramfs archives: the "newc" format of cpio, as `Documentation/driver-api/early-userspace/
//! buffer-format.rst` of Linux describes it. Written here because the kernel wants device nodes,
//! which a file tree made without root cannot hold, and because the same input must give the
//! same bytes: no owner, inode number or time of the build machine gets in.

use std::collections::BTreeSet;

const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_REGULAR: u32 = 0o100_000;
const TYPE_CHARACTER: u32 = 0o020_000;

/// An archive in the making.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<String>,
    inode: u32,
}

impl Archive {
    /// Adds a directory and those above it.
    pub(crate) fn directory(&mut self, path: &str) {
        for (at, _) in path.match_indices('/').chain([(path.len(), "")]) {
            let name = &path[..at];
            if !name.is_empty() && self.directories.insert(name.to_owned()) {
                self.entry(name, TYPE_DIRECTORY | 0o755, (0, 0), &[]);
            }
        }
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.parent_of(path);
        self.entry(path, TYPE_REGULAR | mode, (0, 0), data);
    }

    pub(crate) fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.parent_of(path);
        self.entry(path, TYPE_CHARACTER | mode, (major, minor), &[]);
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.pad(512);
        self.bytes
    }

    fn parent_of(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(data.len()).expect("initramfs files are below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("names are short");
        // ino, mode, uid, gid, nlink, mtime, size, device (major, minor), rdev (major, minor),
        // name size, checksum (unused in this variant)
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(data);
        self.pad(4);
    }

    fn pad(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_same_input_gives_the_same_bytes_and_parents_come_first() {
        let make = || {
            let mut archive = Archive::default();
            archive.file("a/b/c", 0o755, b"hello");
            archive.character_device("a/console", 0o600, 5, 1);
            archive.finish()
        };
        assert_eq!(make(), make());
        let text = String::from_utf8_lossy(&make()).into_owned();
        assert!(text.find("a\0").unwrap() < text.find("a/b\0").unwrap());
        assert!(text.find("a/b\0").unwrap() < text.find("a/b/c\0").unwrap());
    }

    #[test]
    fn the_cpio_program_lists_what_was_added() {
        let mut archive = Archive::default();
        archive.file("init", 0o755, b"#!/bin/sh\n");
        archive.file("bin/sh", 0o755, b"");
        let mut child = match Command::new("cpio")
            .args(["-it", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        {
            Ok(child) => child,
            Err(error) => {
                println!("SKIP: no cpio program: {error}");
                return;
            }
        };
        child.stdin.take().unwrap().write_all(&archive.finish()).unwrap();
        let listed = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&listed.stdout), "init\nbin\nbin/sh\n");
    }
}
