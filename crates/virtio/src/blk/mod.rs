//! Block device (virtio 1.2, section 5.2) on a raw file or a block device of the host.
//!
//! - [`spec`]: constants of the specification; [`request`]: parses and checks a request;
//! - [`engine`]: requests in flight; [`backend`]: io_uring ([`ring`]) or, where the host forbids
//!   it, synchronous system calls ([`direct`]).
//!
//! Discard and write-zeroes use `fallocate` for files and for block devices (`blkdev_fallocate`
//! unmaps or zeroes). Unlike the `BLKDISCARD` ioctl it can be queued in io_uring, so a large
//! discard does not block the worker.

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

/// Linux allocates a request (about 500 bytes) per entry and disk: a larger queue would cost an
/// idle guest memory without more throughput.
const QUEUE_SIZE: u16 = 128;
/// Data segments per request: with header and status the queue size, as a driver without indirect
/// descriptors needs.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// log2 of sectors per physical block: 4 KiB, the page size of the host.
const PHYSICAL_BLOCK_EXP: u8 = 3;

#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    #[error("serial {serial:?} is not 1 to {ID_LEN} printable ASCII bytes")]
    Serial { serial: String },
    #[error("cannot stat the disk")]
    Examine(#[source] io::Error),
    #[error("disk is neither a regular file nor a block device")]
    Kind,
    #[error("disk of {size} bytes is smaller than a sector")]
    Empty { size: u64 },
}

/// The device.
pub struct Block {
    file: Arc<File>,
    id: [u8; ID_LEN],
    limits: Limits,
    block_device: bool,
    /// The backend between activations. It is opened when the device is created: the seccomp filter
    /// of the vCPU threads that activate it forbids io_uring_setup.
    backend: Arc<Mutex<Option<Backend>>>,
    counters: Arc<DeviceCounters>,
}

impl Block {
    /// A disk on `file`, a regular file or block device. Its size is read now, in whole sectors of
    /// 512 bytes. `serial` is 1 to 20 printable ASCII bytes (VIRTIO_BLK_T_GET_ID).
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

    fn check_saveable(&self) -> Result<(), String> {
        Ok(())
    }

    fn counters(&self) -> Arc<DeviceCounters> {
        self.counters.clone()
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn Engine>> {
        let [queue] = take_queues(activation.queues)?;
        let idle_backend = self.backend.clone();
        let kept = idle_backend.lock().unwrap_or_else(PoisonError::into_inner).take();
        // There is none only after a reset with requests that did not complete.
        let backend = kept.unwrap_or_else(|| {
            let limit = &self.counters.limit;
            guest_warn!(
                limit,
                "io_uring requests did not complete; further ones run one at a time"
            );
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
            idle_backend,
            counters: self.counters.clone(),
            slots: std::iter::repeat_with(|| None).take(slots).collect(),
            free: (0..slots).rev().collect(),
            draining: false,
            no_free_slot: false,
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
