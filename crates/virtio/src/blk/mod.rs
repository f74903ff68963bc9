//! Block device (virtio 1.2, section 5.2) on a raw file or a block device of the host.
//!
//! - [`spec`]: the specification's numbers; [`request`]: a chain becomes a checked operation;
//! - [`engine`]: operations under way; [`backend`]: io_uring ([`ring`]) or, where the host forbids
//!   it, plain calls ([`direct`]).
//!
//! Discards and zeroes go through `fallocate` for files and for block devices alike (the kernel's
//! `blkdev_fallocate` unmaps or zeroes): unlike the `BLKDISCARD` ioctl it can be queued, so a
//! gigabyte's discard never stops the worker.

mod backend;
mod direct;
mod engine;
mod request;
mod ring;
mod spec;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::sync::{Arc, Mutex, PoisonError};

use self::backend::Backend;
use self::direct::Direct;
use self::engine::BlockEngine;
use self::request::{Limits, MAX_RANGE_SECTORS};
use self::spec::{
    Config, F_BLK_SIZE, F_DISCARD, F_FLUSH, F_RO, F_SEG_MAX, F_TOPOLOGY, F_WRITE_ZEROES, ID_LEN,
    SECTOR,
};
use crate::device::{
    Activation, DeviceCounters, DeviceKind, Engine, VirtioDevice, read_config_bytes, take_queues,
};
use crate::features;
use crate::guest_warn;

/// Linux allocates and zeroes a request (some 500 bytes) for each, a disk: more would cost an idle
/// guest memory and make no disk faster.
const QUEUE_SIZE: u16 = 128;
/// Data segments in a request; with header and status they are as many as the queue is long, which
/// a driver without indirect descriptors needs.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Physical blocks of 4 KiB, as the host's page cache has them.
const PHYSICAL_BLOCK_EXP: u8 = 3;

#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    #[error("serial {serial:?} is not 1 to {ID_LEN} printable ASCII bytes")]
    Serial { serial: String },
    #[error("disk cannot be examined")]
    Examine(#[source] io::Error),
    #[error("disk is neither a regular file nor a block device")]
    Kind,
    #[error("disk of {size} bytes has no whole sector")]
    Empty { size: u64 },
}

/// The device.
pub struct Block {
    file: Arc<File>,
    id: [u8; ID_LEN],
    limits: Limits,
    block_device: bool,
    /// Between activations; opened when the device is made: the threads that activate it may make
    /// no rings.
    backend: Arc<Mutex<Option<Backend>>>,
    counters: Arc<DeviceCounters>,
}

impl Block {
    /// A disk on `file`. Its size is taken now; a trailing part of a sector is not seen.
    pub fn new(file: File, serial: &str, read_only: bool) -> Result<Self, BlockError> {
        let mut id = [0; ID_LEN];
        let good =
            (1..=ID_LEN).contains(&serial.len()) && serial.bytes().all(|b| b.is_ascii_graphic());
        if !good {
            return Err(BlockError::Serial { serial: serial.to_owned() });
        }
        id[..serial.len()].copy_from_slice(serial.as_bytes());
        let metadata = file.metadata().map_err(BlockError::Examine)?;
        let block_device = metadata.file_type().is_block_device();
        let size = if block_device {
            block_device_size(&file).map_err(BlockError::Examine)?
        } else if metadata.is_file() {
            metadata.len()
        } else {
            return Err(BlockError::Kind);
        };
        let capacity = size / SECTOR;
        if capacity == 0 {
            return Err(BlockError::Empty { size });
        }
        let file = Arc::new(file);
        let backend = Backend::open(&file, usize::from(QUEUE_SIZE));
        Ok(Self {
            file,
            id,
            limits: Limits { capacity, read_only },
            block_device,
            backend: Arc::new(Mutex::new(Some(backend))),
            counters: Arc::default(),
        })
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let access = if self.limits.read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES };
        features::COMMON | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | access
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = Config {
            capacity: self.limits.capacity,
            seg_max: SEG_MAX,
            blk_size: SECTOR as u32,
            physical_block_exp: PHYSICAL_BLOCK_EXP,
            max_discard_sectors: MAX_RANGE_SECTORS,
            max_discard_seg: 1,
            discard_sector_alignment: 1 << PHYSICAL_BLOCK_EXP,
            max_write_zeroes_sectors: MAX_RANGE_SECTORS,
            max_write_zeroes_seg: 1,
            write_zeroes_may_unmap: 1,
        };
        read_config_bytes(&config.bytes(), offset, data);
    }

    fn counters(&self) -> Arc<DeviceCounters> {
        self.counters.clone()
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn Engine>> {
        let [queue] = take_queues(activation.queues)?;
        let home = self.backend.clone();
        let kept = home.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Only after a reset with requests stuck in the old one is there none.
        let backend = kept.unwrap_or_else(|| {
            let limit = &self.counters.limit;
            guest_warn!(limit, "requests are stuck in io_uring; others run one by one from now on");
            Backend::Direct(Direct::new(self.file.clone()))
        });
        let slots = usize::from(QUEUE_SIZE);
        Ok(Box::new(BlockEngine {
            limits: self.limits,
            id: self.id,
            write_through: activation.features & F_FLUSH == 0,
            block_device: self.block_device,
            queue,
            backend: Some(backend),
            home,
            counters: self.counters.clone(),
            slots: std::iter::repeat_with(|| None).take(slots).collect(),
            free: (0..slots).rev().collect(),
            draining: false,
            starved: false,
            cache: Default::default(),
        }))
    }
}

#[allow(unsafe_code)] // an ioctl
fn block_device_size(file: &File) -> io::Result<u64> {
    /// `_IOR(0x12, 114, size_t)`, linux/fs.h.
    const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64 through its argument, which points to `size`.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(size)
}
