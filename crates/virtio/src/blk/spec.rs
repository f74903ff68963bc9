//! Constants of the block device (virtio 1.2, section 5.2).

/// Section 5.2.3: feature bits.
pub(super) const F_SEG_MAX: u64 = 1 << 2;
pub(super) const F_RO: u64 = 1 << 5;
pub(super) const F_BLK_SIZE: u64 = 1 << 6;
pub(super) const F_FLUSH: u64 = 1 << 9;
pub(super) const F_TOPOLOGY: u64 = 1 << 10;
pub(super) const F_DISCARD: u64 = 1 << 13;
pub(super) const F_WRITE_ZEROES: u64 = 1 << 14;

/// Section 5.2.6: request types.
pub(super) const T_IN: u32 = 0;
pub(super) const T_OUT: u32 = 1;
pub(super) const T_FLUSH: u32 = 4;
pub(super) const T_GET_ID: u32 = 8;
pub(super) const T_DISCARD: u32 = 11;
pub(super) const T_WRITE_ZEROES: u32 = 13;

/// Section 5.2.6: the status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// Unit of capacity and ranges, bytes, independent of the block size.
pub(super) const SECTOR: u64 = 512;
/// `struct virtio_blk_req` before its data: type, reserved, sector.
pub(super) const HEADER_LEN: usize = 16;
/// Bytes of the answer to GET_ID.
pub(super) const ID_LEN: usize = 20;
/// `struct virtio_blk_discard_write_zeroes`: sector, count, flags.
pub(super) const RANGE_LEN: usize = 16;
/// The only flag in it.
pub(super) const RANGE_UNMAP: u32 = 1;

/// Section 5.2.4: the fields of `struct virtio_blk_config` for the offered features.
#[derive(Debug, Clone, Copy)]
pub(super) struct Config {
    pub(super) capacity: u64,
    pub(super) seg_max: u32,
    pub(super) blk_size: u32,
    /// log2 of logical blocks per physical block.
    pub(super) physical_block_exp: u8,
    pub(super) max_discard_sectors: u32,
    pub(super) max_discard_seg: u32,
    pub(super) discard_sector_alignment: u32,
    pub(super) max_write_zeroes_sectors: u32,
    pub(super) max_write_zeroes_seg: u32,
    pub(super) write_zeroes_may_unmap: u8,
}

pub(super) const CONFIG_LEN: usize = 60;

impl Config {
    pub(super) fn bytes(&self) -> [u8; CONFIG_LEN] {
        let Self {
            capacity,
            seg_max,
            blk_size,
            physical_block_exp,
            max_discard_sectors,
            max_discard_seg,
            discard_sector_alignment,
            max_write_zeroes_sectors,
            max_write_zeroes_seg,
            write_zeroes_may_unmap,
        } = *self;
        let mut bytes = [0; CONFIG_LEN];
        bytes[..8].copy_from_slice(&capacity.to_le_bytes());
        bytes[24] = physical_block_exp;
        bytes[56] = write_zeroes_may_unmap;
        for (at, word) in [
            (12, seg_max),
            (20, blk_size),
            (36, max_discard_sectors),
            (40, max_discard_seg),
            (44, discard_sector_alignment),
            (48, max_write_zeroes_sectors),
            (52, max_write_zeroes_seg),
        ] {
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}
