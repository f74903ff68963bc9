//! Saving the transport and loading it into a new device.
//!
//! Positions in the rings are not saved: a drained engine has used all chains that it took from
//! the available ring, in order or not, except buffers for input, which it takes in order. So both
//! positions are the used ring's index, which is in guest memory.

use std::sync::atomic::Ordering;

use pci::{ConfigState, MsixState, StateError};
use serde::{Deserialize, Serialize};

use super::VirtioPci;
use super::queues::QueueSetup;
use super::spec::status;
use crate::device::Interrupt;

/// Bytes of the device configuration that are compared; more than any device here has.
const DEVICE_CONFIG: usize = 256;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VirtioState {
    /// Must be the same in the new device: features depend on it, and the driver has read it.
    device_config: Vec<u8>,
    config: ConfigState,
    msix: MsixState,
    status: u8,
    isr: u8,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    queues: Vec<QueueState>,
    queue_select: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueState {
    size: u16,
    enabled: bool,
    desc: u64,
    driver: u64,
    device: u64,
}

impl VirtioPci {
    pub(super) fn save_state(&mut self) -> Result<serde_json::Value, StateError> {
        let name = self.device.kind().name();
        self.poll_reset();
        if self.resetting.is_some() {
            return Err(StateError::Unsaveable { why: "the driver is resetting it".to_owned() });
        }
        self.device.check_saveable().map_err(|why| StateError::Unsaveable {
            why: format!("device of kind {name}: {why}"),
        })?;
        let shared = &self.shared;
        let queue = |setup: &QueueSetup| {
            let QueueSetup { index: _, max: _, size, enabled, desc, driver, device } = *setup;
            QueueState { size, enabled, desc, driver, device }
        };
        let state = VirtioState {
            device_config: self.device_config(),
            config: self.config.save(),
            msix: shared.msix.save(),
            status: shared.status.load(Ordering::Acquire),
            isr: shared.isr.load(Ordering::Acquire),
            config_vector: shared.config_vector.load(Ordering::Acquire),
            queue_vectors: shared.queue_vectors.iter().map(|v| v.load(Ordering::Acquire)).collect(),
            queues: self.queues.iter().map(queue).collect(),
            queue_select: self.queue_select,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            driver_features: self.driver_features,
        };
        Ok(serde_json::to_value(state)?)
    }

    pub(super) fn load_state(&mut self, state: serde_json::Value) -> Result<(), StateError> {
        let VirtioState {
            device_config,
            config,
            msix,
            status: bits,
            isr,
            config_vector,
            queue_vectors,
            queues,
            queue_select,
            device_feature_select,
            driver_feature_select,
            driver_features,
        } = serde_json::from_value(state)?;
        let mismatch = |what: &str| Err(StateError::mismatch(what));
        if self.active.is_some() || self.shared.status.load(Ordering::Acquire) != 0 {
            return mismatch("a driver uses it already");
        }
        if device_config != self.device_config() {
            return mismatch("device configuration");
        }
        if queues.len() != self.queues.len() || queue_vectors.len() != self.queues.len() {
            return mismatch("number of queues");
        }
        if bits & !(status::DRIVER_BITS | status::NEEDS_RESET) != 0 {
            return mismatch("device status");
        }
        self.config.load(&config)?;
        let memory = self.accessible_memory();
        for (setup, saved) in self.queues.iter_mut().zip(queues) {
            let QueueState { size, enabled, desc, driver, device } = saved;
            let (index, max) = (setup.index, setup.max);
            let loaded = QueueSetup { index, max, size, enabled, desc, driver, device };
            loaded.build(&memory, false).map_err(|e| StateError::mismatch(e.to_string()))?;
            *setup = loaded;
        }
        self.driver_features = driver_features;
        if bits & status::FEATURES_OK != 0 && !self.features_acceptable() {
            return mismatch("features that the driver has accepted");
        }
        self.queue_select = queue_select;
        self.device_feature_select = device_feature_select;
        self.driver_feature_select = driver_feature_select;
        self.shared.isr.store(isr, Ordering::Release);
        self.shared.config_vector.store(self.valid_vector(config_vector), Ordering::Release);
        for (place, vector) in self.shared.queue_vectors.iter().zip(queue_vectors) {
            place.store(self.valid_vector(vector), Ordering::Release);
        }
        self.shared.msix.load(&msix)?;
        self.shared.status.store(bits, Ordering::Release);
        let running = status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        if bits & running == running && bits & (status::NEEDS_RESET | status::FAILED) == 0 {
            self.continue_queues()?;
        }
        Ok(())
    }

    fn continue_queues(&mut self) -> Result<(), StateError> {
        self.activate(super::Start::AtUsedIndex);
        let Some(active) = &self.active else {
            return Err(StateError::mismatch("the device cannot be activated"));
        };
        // An interrupt may have been on its way when the VM was paused. Drivers expect spurious
        // ones.
        for queue in self.queues.iter().filter(|queue| queue.enabled) {
            active.interrupt.queue(queue.index);
        }
        Ok(())
    }

    fn device_config(&self) -> Vec<u8> {
        let mut bytes = vec![0; DEVICE_CONFIG];
        self.device.read_config(0, &mut bytes);
        bytes
    }
}
