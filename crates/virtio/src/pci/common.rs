//! The common configuration structure (virtio 1.2, section 4.1.4.3).
//!
//! A driver accesses each field with its own width, 64-bit fields also as two 32-bit words (section
//! 4.1.3.1). Other reads return zero, other writes are ignored.

use std::sync::atomic::{AtomicU16, Ordering};

use super::queues::QueueSetup;
use super::spec::{NO_VECTOR, common, status};
use super::{Start, VirtioPci};
use crate::features;

impl VirtioPci {
    pub(super) fn common_read(&mut self, offset: u64, data: &mut [u8]) {
        let queue = self.queues.get(usize::from(self.queue_select));
        let value = match (offset, data.len()) {
            (common::DEVICE_FEATURE_SELECT, 4) => u64::from(self.device_feature_select),
            (common::DEVICE_FEATURE, 4) => {
                feature_word(self.device.features(), self.device_feature_select)
            }
            (common::DRIVER_FEATURE_SELECT, 4) => u64::from(self.driver_feature_select),
            (common::DRIVER_FEATURE, 4) => {
                feature_word(self.driver_features, self.driver_feature_select)
            }
            (common::CONFIG_VECTOR, 2) => load(&self.shared.config_vector),
            (common::NUM_QUEUES, 2) => self.queues.len() as u64,
            (common::DEVICE_STATUS, 1) => {
                if self.resetting.is_some() {
                    self.finish_reset();
                }
                u64::from(self.status())
            }
            (common::CONFIG_GENERATION, 1) => u64::from(self.device.config_generation()),
            (common::QUEUE_SELECT, 2) => u64::from(self.queue_select),
            (common::QUEUE_SIZE, 2) => queue.map_or(0, |q| u64::from(q.size)),
            (common::QUEUE_VECTOR, 2) => {
                let vector = self.shared.queue_vectors.get(usize::from(self.queue_select));
                vector.map_or(u64::from(NO_VECTOR), load)
            }
            (common::QUEUE_ENABLE, 2) => queue.map_or(0, |q| u64::from(q.enabled)),
            (common::QUEUE_NOTIFY_OFF, 2) => queue.map_or(0, |q| u64::from(q.index)),
            (_, 4 | 8) => queue.map_or(0, |q| {
                let shift = 8 * (offset % 8);
                match offset & !4 {
                    common::QUEUE_DESC => q.desc >> shift,
                    common::QUEUE_DRIVER => q.driver >> shift,
                    common::QUEUE_DEVICE => q.device >> shift,
                    _ => 0,
                }
            }),
            _ => 0,
        };
        let len = data.len().min(8);
        data[..len].copy_from_slice(&value.to_le_bytes()[..len]);
    }

    pub(super) fn common_write(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        let Some(place) = bytes.get_mut(..data.len()) else { return };
        place.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        if offset == common::DEVICE_STATUS && data.len() == 1 {
            return self.write_status(value as u8);
        }
        // A driver that does not wait until the reset is complete: its writes are ignored.
        self.poll_reset();
        if self.resetting.is_some() {
            return;
        }
        let features_open = self.status() & status::FEATURES_OK == 0;
        match (offset, data.len()) {
            (common::DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = value as u32,
            (common::DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = value as u32,
            (common::DRIVER_FEATURE, 4) if features_open => match self.driver_feature_select {
                0 => self.driver_features = self.driver_features >> 32 << 32 | value,
                1 => {
                    self.driver_features = self.driver_features & u64::from(u32::MAX) | value << 32;
                }
                _ => {}
            },
            (common::CONFIG_VECTOR, 2) => {
                let vector = self.valid_vector(value as u16);
                self.shared.config_vector.store(vector, Ordering::Release);
            }
            (common::QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (common::QUEUE_VECTOR, 2) => {
                let vector = self.valid_vector(value as u16);
                if let Some(place) = self.shared.queue_vectors.get(usize::from(self.queue_select)) {
                    place.store(vector, Ordering::Release);
                }
            }
            _ => self.write_queue(offset, data.len(), value),
        }
    }

    /// Size, addresses and enable of the selected queue; read-only once it is enabled.
    fn write_queue(&mut self, offset: u64, len: usize, value: u64) {
        let running = self.status() & status::DRIVER_OK != 0;
        let mem = self.accessible_memory();
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        if queue.enabled || running {
            return;
        }
        match (offset, len) {
            (common::QUEUE_SIZE, 2) => queue.size = value as u16,
            (common::QUEUE_ENABLE, 2) if value == 1 => {
                let setup = QueueSetup { enabled: true, ..queue.clone() };
                match setup.build(&mem, false) {
                    Ok(_) => *queue = setup,
                    Err(error) => self.fail(&error),
                }
            }
            (_, 4 | 8) => {
                let register = match offset & !4 {
                    common::QUEUE_DESC => &mut queue.desc,
                    common::QUEUE_DRIVER => &mut queue.driver,
                    common::QUEUE_DEVICE => &mut queue.device,
                    _ => return,
                };
                *register = match (offset & 4, len) {
                    (0, 8) => value,
                    (0, _) => *register >> 32 << 32 | value,
                    (_, 4) => *register & u64::from(u32::MAX) | value << 32,
                    _ => return,
                };
            }
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) {
        self.poll_reset();
        if value == 0 {
            return self.begin_reset();
        }
        if self.resetting.is_some() {
            return;
        }
        let before = self.status();
        let mut set = value & status::DRIVER_BITS & !before;
        if set & status::FEATURES_OK != 0 && !self.features_acceptable() {
            set &= !status::FEATURES_OK;
        }
        let after = before | set;
        let can_run = status::FEATURES_OK | status::DRIVER;
        let error_bits = status::NEEDS_RESET | status::FAILED;
        if set & status::DRIVER_OK != 0 && (after & can_run != can_run || after & error_bits != 0) {
            set &= !status::DRIVER_OK;
        }
        self.shared.status.fetch_or(set, Ordering::AcqRel);
        if set & status::DRIVER_OK != 0 {
            self.activate(Start::New);
        }
    }

    pub(super) fn poll_reset(&mut self) {
        if self.resetting.is_some() {
            self.finish_reset();
        }
    }

    fn status(&self) -> u8 {
        self.shared.status.load(Ordering::Acquire)
    }

    /// Section 6.1: only offered features, and VERSION_1 among them.
    pub(super) fn features_acceptable(&self) -> bool {
        self.driver_features & !self.device.features() == 0
            && self.driver_features & features::VERSION_1 != 0
    }

    /// A vector that this device does not have becomes [`NO_VECTOR`], which the driver reads back
    /// (section 4.1.5.1.2).
    pub(super) fn valid_vector(&self, vector: u16) -> u16 {
        if usize::from(vector) <= self.queues.len() { vector } else { NO_VECTOR }
    }
}

fn feature_word(features: u64, select: u32) -> u64 {
    match select {
        0 => features & u64::from(u32::MAX),
        1 => features >> 32,
        _ => 0,
    }
}

fn load(vector: &AtomicU16) -> u64 {
    u64::from(vector.load(Ordering::Acquire))
}
