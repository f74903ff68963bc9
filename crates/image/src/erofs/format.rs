//! On-disk structures of EROFS for Linux 6.1 and later (Documentation/filesystems/erofs.rst and the
//! layout comments of the kernel's erofs_fs.h): constants and encoders only.
//!
//! Holds only what the writer uses: extended inodes, flat, inline and chunk-based data, inline
//! extended attributes. All values are little-endian.

pub const BLOCK: usize = 4096;
pub const BLOCK_BITS: u8 = 12;
pub const SUPER_OFFSET: usize = 1024;
pub const SUPER_SIZE: usize = 128;
pub const MAGIC: u32 = 0xe0f5_e1e2;

/// An inode number (nid) counts slots of this size from the start of the metadata area.
pub const SLOT: u64 = 32;
pub const INODE_SIZE: usize = 64;
pub const DIRENT_SIZE: usize = 12;
pub const XATTR_HEADER_SIZE: usize = 12;
pub const XATTR_ENTRY_SIZE: usize = 4;
pub const NULL_BLOCK: u32 = u32::MAX;

const _: () = assert!(SUPER_OFFSET + SUPER_SIZE <= BLOCK);
const _: () = assert!(BLOCK == 1 << BLOCK_BITS);
const _: () = assert!((INODE_SIZE as u64).is_multiple_of(SLOT));

pub const COMPAT_SB_CHECKSUM: u32 = 1;
pub const COMPAT_MTIME: u32 = 2;
pub const INCOMPAT_CHUNKED_FILE: u32 = 4;

/// Data layout of an inode (`i_format`, bits 1 to 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Layout {
    FlatPlain = 0,
    FlatInline = 2,
    ChunkBased = 4,
}

pub const TYPE_FILE: u8 = 1;
pub const TYPE_DIR: u8 = 2;
pub const TYPE_CHAR: u8 = 3;
pub const TYPE_BLOCK: u8 = 4;
pub const TYPE_FIFO: u8 = 5;
pub const TYPE_SYMLINK: u8 = 7;

pub const S_IFIFO: u16 = 0o010_000;
pub const S_IFCHR: u16 = 0o020_000;
pub const S_IFDIR: u16 = 0o040_000;
pub const S_IFBLK: u16 = 0o060_000;
pub const S_IFREG: u16 = 0o100_000;
pub const S_IFLNK: u16 = 0o120_000;

#[derive(Debug, Clone, Copy)]
pub struct SuperBlock {
    pub root_nid: u16,
    pub inodes: u64,
    pub blocks: u32,
    pub meta_block: u32,
    pub uuid: [u8; 16],
    pub incompat: u32,
}

impl SuperBlock {
    /// The image's first block, checksum included.
    pub fn encode(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let sb = &mut block[SUPER_OFFSET..];
        sb[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        sb[8..12].copy_from_slice(&(COMPAT_SB_CHECKSUM | COMPAT_MTIME).to_le_bytes());
        sb[12] = BLOCK_BITS;
        sb[14..16].copy_from_slice(&self.root_nid.to_le_bytes());
        sb[16..24].copy_from_slice(&self.inodes.to_le_bytes());
        // build_time (bytes 24..36) stays zero for reproducible images.
        sb[36..40].copy_from_slice(&self.blocks.to_le_bytes());
        sb[40..44].copy_from_slice(&self.meta_block.to_le_bytes());
        sb[48..64].copy_from_slice(&self.uuid);
        sb[80..84].copy_from_slice(&self.incompat.to_le_bytes());
        // The kernel computes the checksum from the superblock to the end of its block with the
        // field set to zero and does not invert the result.
        let sum = crc32c(!0, sb);
        sb[4..8].copy_from_slice(&sum.to_le_bytes());
        block
    }
}

/// An extended (64-byte) inode.
#[derive(Debug, Clone, Copy)]
pub struct RawInode {
    pub layout: Layout,
    pub xattr_count: u16,
    pub mode: u16,
    pub size: u64,
    /// First data block, device number or chunk format, depending on type and layout.
    pub union: u32,
    pub ino: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    pub mtime_nsec: u32,
    pub nlink: u32,
}

impl RawInode {
    pub fn encode(&self) -> [u8; INODE_SIZE] {
        let mut raw = [0; INODE_SIZE];
        let format = 1 | ((self.layout as u16) << 1);
        raw[0..2].copy_from_slice(&format.to_le_bytes());
        raw[2..4].copy_from_slice(&self.xattr_count.to_le_bytes());
        raw[4..6].copy_from_slice(&self.mode.to_le_bytes());
        raw[8..16].copy_from_slice(&self.size.to_le_bytes());
        raw[16..20].copy_from_slice(&self.union.to_le_bytes());
        raw[20..24].copy_from_slice(&self.ino.to_le_bytes());
        raw[24..28].copy_from_slice(&self.uid.to_le_bytes());
        raw[28..32].copy_from_slice(&self.gid.to_le_bytes());
        raw[32..40].copy_from_slice(&self.mtime.to_le_bytes());
        raw[40..44].copy_from_slice(&self.mtime_nsec.to_le_bytes());
        raw[44..48].copy_from_slice(&self.nlink.to_le_bytes());
        raw
    }
}

/// Device number in the kernel's `new_encode_dev` form; `None` if major exceeds 12 bits or minor 20
/// bits.
pub fn encode_device(major: u32, minor: u32) -> Option<u32> {
    (major < 1 << 12 && minor < 1 << 20)
        .then_some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// Splits an attribute name into the index of a known prefix and the rest; `None` for namespaces
/// that the format cannot represent.
pub fn split_xattr_name(name: &[u8]) -> Option<(u8, &[u8])> {
    const PREFIXES: [(u8, &[u8]); 5] = [
        (1, b"user."),
        (2, b"system.posix_acl_access"),
        (3, b"system.posix_acl_default"),
        (4, b"trusted."),
        (6, b"security."),
    ];
    PREFIXES.iter().find_map(|&(index, prefix)| {
        let rest = name.strip_prefix(prefix)?;
        // The two ACL prefixes are complete names; the others need a suffix.
        ((index == 2 || index == 3) == rest.is_empty()).then_some((index, rest))
    })
}

/// CRC-32C (Castagnoli), reflected, without the final inversion.
fn crc32c(seed: u32, data: &[u8]) -> u32 {
    data.iter().fold(seed, |mut crc, &byte| {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & 0u32.wrapping_sub(crc & 1));
        }
        crc
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_has_the_check_value_of_rfc_3720() {
        assert_eq!(!crc32c(!0, b"123456789"), 0xe306_9283);
    }

    #[test]
    fn device_numbers_keep_twenty_bits_of_minor() {
        assert_eq!(encode_device(8, 1), Some(0x801));
        assert_eq!(encode_device(1, 0x12345), Some(0x1230_0145));
        assert_eq!(encode_device(1 << 12, 0), None);
        assert_eq!(encode_device(0, 1 << 20), None);
    }

    #[test]
    fn xattr_names_split_at_known_prefixes_only() {
        assert_eq!(split_xattr_name(b"user.a"), Some((1, &b"a"[..])));
        assert_eq!(split_xattr_name(b"security.capability"), Some((6, &b"capability"[..])));
        assert_eq!(split_xattr_name(b"system.posix_acl_access"), Some((2, &b""[..])));
        assert_eq!(split_xattr_name(b"user."), None);
        assert_eq!(split_xattr_name(b"system.posix_acl_accessory"), None);
        assert_eq!(split_xattr_name(b"os2.x"), None);
    }
}
