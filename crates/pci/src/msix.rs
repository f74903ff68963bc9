//! MSI-X: table, pending bits, masks (PCI 3.0, section 6.8.2).
//!
//! vCPU threads program it, worker threads trigger vectors. A vector that is triggered while masked
//! becomes pending and is triggered when it is unmasked.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::{MsixMessage, StateError, Vectors};

/// Bytes of a table entry: address, data, vector control.
pub const MSIX_ENTRY_SIZE: usize = 16;
/// Bit in vector control.
const ENTRY_MASKED: u32 = 1;
/// Bits in the high byte of message control.
const CONTROL_ENABLE: u8 = 1 << 7;
const CONTROL_MASK_ALL: u8 = 1 << 6;

/// One device's MSI-X state.
pub struct Msix {
    vectors: Arc<dyn Vectors>,
    /// A failure was logged. Further ones are not: a guest could fill the log with invalid
    /// messages.
    warned: AtomicBool,
    state: Mutex<State>,
}

struct State {
    enabled: bool,
    mask_all: bool,
    entries: Vec<Entry>,
}

#[derive(Clone, Copy)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
    /// The message last passed to [`Vectors::program`].
    programmed: Option<(u64, u32)>,
}

/// The state of a device's MSI-X.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    enabled: bool,
    mask_all: bool,
    entries: Vec<EntryState>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EntryState {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

impl Msix {
    /// `count` vectors, all masked, MSI-X disabled.
    pub fn new(count: u16, vectors: Arc<dyn Vectors>) -> Self {
        let entry =
            Entry { address: 0, data: 0, control: ENTRY_MASKED, pending: false, programmed: None };
        let entries = vec![entry; usize::from(count)];
        Self {
            vectors,
            warned: AtomicBool::new(false),
            state: Mutex::new(State { enabled: false, mask_all: false, entries }),
        }
    }

    /// Raises a vector, or sets its pending bit while it is masked. Unknown vectors are ignored.
    pub fn trigger(&self, vector: u16) {
        let mut state = self.lock();
        let ready = state.enabled && !state.mask_all;
        let Some(entry) = state.entries.get_mut(usize::from(vector)) else { return };
        if ready && entry.control & ENTRY_MASKED == 0 && entry.programmed.is_some() {
            self.fire(vector);
        } else {
            entry.pending = true;
        }
    }

    /// The enable bit of message control.
    pub fn enabled(&self) -> bool {
        self.lock().enabled
    }

    /// See [`Vectors::event`].
    pub fn event(&self, vector: u16) -> io::Result<EventFd> {
        self.vectors.event(vector)
    }

    /// The guest has written the high byte of message control: enable and function mask.
    pub fn set_control(&self, high: u8) {
        let mut state = self.lock();
        state.enabled = high & CONTROL_ENABLE != 0;
        state.mask_all = high & CONTROL_MASK_ALL != 0;
        if state.enabled {
            for vector in 0..state.entries.len() {
                self.update_vector(&mut state, vector);
            }
        } else {
            self.mask_all_vectors(&mut state);
        }
    }

    /// Table, pending bits and masks.
    pub fn save(&self) -> MsixState {
        let state = self.lock();
        let State { enabled, mask_all, entries } = &*state;
        let entry = |entry: &Entry| {
            let Entry { address, data, control, pending, programmed: _ } = *entry;
            EntryState { address, data, masked: control & ENTRY_MASKED != 0, pending }
        };
        let entries = entries.iter().map(entry).collect();
        MsixState { enabled: *enabled, mask_all: *mask_all, entries }
    }

    /// Sets table, pending bits and masks; programs and triggers vectors as the guest's own writes
    /// would. Fails if the state has another number of vectors.
    pub fn load(&self, saved: &MsixState) -> Result<(), StateError> {
        let mut state = self.lock();
        let MsixState { enabled, mask_all, entries } = saved;
        if entries.len() != state.entries.len() {
            let what = format!("{} MSI-X vectors", entries.len());
            return Err(StateError::mismatch(what));
        }
        for (entry, saved) in state.entries.iter_mut().zip(entries) {
            let EntryState { address, data, masked, pending } = *saved;
            let control = if masked { ENTRY_MASKED } else { 0 };
            *entry = Entry { address, data, control, pending, programmed: None };
        }
        (state.enabled, state.mask_all) = (*enabled, *mask_all);
        for vector in 0..state.entries.len() {
            self.update_vector(&mut state, vector);
        }
        Ok(())
    }

    /// Reads the table at byte `offset`; accesses may have any size and alignment.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (n, byte) in data.iter_mut().enumerate() {
            let at = (offset as usize).saturating_add(n);
            let entry = state.entries.get(at / MSIX_ENTRY_SIZE);
            *byte = entry.map_or(0, |e| e.bytes()[at % MSIX_ENTRY_SIZE]);
        }
    }

    /// Writes the table at byte `offset`. Only aligned 32-bit and 64-bit writes are valid (section
    /// 6.8.2); others are ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let at = offset as usize;
        if !matches!(data.len(), 4 | 8) || !at.is_multiple_of(data.len()) {
            return;
        }
        let mut state = self.lock();
        let vector = at / MSIX_ENTRY_SIZE;
        let Some(entry) = state.entries.get_mut(vector) else { return };
        let mut bytes = entry.bytes();
        let at = at % MSIX_ENTRY_SIZE;
        bytes[at..at + data.len()].copy_from_slice(data);
        entry.set_bytes(&bytes);
        self.update_vector(&mut state, vector);
    }

    /// Reads the pending bit array at byte `offset`.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (n, byte) in data.iter_mut().enumerate() {
            let at = (offset as usize).saturating_add(n);
            let entries = state.entries.iter().skip(at.saturating_mul(8)).take(8);
            *byte = entries.enumerate().fold(0, |bits, (n, e)| bits | u8::from(e.pending) << n);
        }
    }

    /// For an unmasked vector: programs its message if that has changed, and triggers it if
    /// pending.
    fn update_vector(&self, state: &mut State, vector: usize) {
        if !state.enabled || state.mask_all {
            return;
        }
        let entry = &mut state.entries[vector];
        if entry.control & ENTRY_MASKED != 0 {
            return;
        }
        let message = (entry.address, entry.data);
        if entry.programmed != Some(message) {
            let (address, data) = message;
            let message = MsixMessage { address, data, masked: false };
            if let Err(error) = self.vectors.program(vector as u16, message) {
                self.warn_once(vector, &error);
                return;
            }
            entry.programmed = Some((address, data));
        }
        if std::mem::take(&mut entry.pending) {
            self.fire(vector as u16);
        }
    }

    fn mask_all_vectors(&self, state: &mut State) {
        for (vector, entry) in state.entries.iter_mut().enumerate() {
            entry.pending = false;
            if let Some((address, data)) = entry.programmed.take() {
                let message = MsixMessage { address, data, masked: true };
                if let Err(error) = self.vectors.program(vector as u16, message) {
                    self.warn_once(vector, &error);
                }
            }
        }
    }

    fn warn_once(&self, vector: usize, error: &io::Error) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(vector, %error, "cannot program an MSI-X vector");
        }
    }

    fn fire(&self, vector: u16) {
        if let Err(error) = self.vectors.trigger(vector) {
            tracing::debug!(vector, %error, "cannot trigger an MSI-X vector");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn bytes(&self) -> [u8; MSIX_ENTRY_SIZE] {
        let mut bytes = [0; MSIX_ENTRY_SIZE];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.data.to_le_bytes());
        bytes[12..].copy_from_slice(&self.control.to_le_bytes());
        bytes
    }

    fn set_bytes(&mut self, bytes: &[u8; MSIX_ENTRY_SIZE]) {
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|n| bytes[at + n]));
        self.address = u64::from(word(0)) | u64::from(word(4)) << 32;
        self.data = word(8);
        self.control = word(12) & ENTRY_MASKED;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[derive(Default)]
    struct Recorder {
        programmed: Mutex<Vec<(u16, MsixMessage)>>,
        fired: AtomicU32,
    }

    impl Vectors for Recorder {
        fn program(&self, vector: u16, message: MsixMessage) -> io::Result<()> {
            self.programmed.lock().unwrap().push((vector, message));
            Ok(())
        }

        fn trigger(&self, _vector: u16) -> io::Result<()> {
            self.fired.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    fn msix() -> (Arc<Recorder>, Msix) {
        let recorder = Arc::new(Recorder::default());
        (recorder.clone(), Msix::new(2, recorder))
    }

    fn program(msix: &Msix, vector: u64) {
        let at = vector * 16;
        msix.write_table(at, &0xfee0_0000u32.to_le_bytes());
        msix.write_table(at + 4, &0u32.to_le_bytes());
        msix.write_table(at + 8, &0x41u32.to_le_bytes());
        msix.write_table(at + 12, &0u32.to_le_bytes());
    }

    #[test]
    fn a_vector_triggers_once_it_is_programmed_and_unmasked() {
        let (recorder, msix) = msix();
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        program(&msix, 0);
        assert!(recorder.programmed.lock().unwrap().is_empty());
        msix.set_control(CONTROL_ENABLE);
        let message = MsixMessage { address: 0xfee0_0000, data: 0x41, masked: false };
        assert_eq!(*recorder.programmed.lock().unwrap(), [(0, message)]);
        msix.trigger(0);
        assert_eq!(recorder.fired.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_vector_triggered_while_masked_is_pending_until_it_is_unmasked() {
        let (recorder, msix) = msix();
        msix.set_control(CONTROL_ENABLE);
        program(&msix, 1);
        msix.write_table(16 + 12, &1u32.to_le_bytes());
        msix.trigger(1);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 0b10);
        assert_eq!(recorder.fired.load(Ordering::Relaxed), 0);
        msix.write_table(16 + 12, &0u32.to_le_bytes());
        assert_eq!(recorder.fired.load(Ordering::Relaxed), 1);
        // Unmasked with the same message: not programmed again.
        assert_eq!(recorder.programmed.lock().unwrap().len(), 1);
    }

    #[test]
    fn accesses_outside_the_table_are_ignored() {
        let (recorder, msix) = msix();
        msix.set_control(CONTROL_ENABLE);
        msix.write_table(32, &[0xff; 4]);
        msix.write_table(1, &[0xff; 4]);
        msix.write_table(3, &[0xff; 2]);
        msix.trigger(77);
        let mut data = [0xaa; 8];
        msix.read_table(28, &mut data);
        assert_eq!(data, [1, 0, 0, 0, 0, 0, 0, 0]);
        msix.read_pending(u64::MAX - 8, &mut data);
        assert_eq!(recorder.fired.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn disabling_msix_masks_the_programmed_vectors() {
        let (recorder, msix) = msix();
        msix.set_control(CONTROL_ENABLE);
        program(&msix, 0);
        msix.set_control(0);
        assert!(recorder.programmed.lock().unwrap().last().unwrap().1.masked);
        msix.trigger(0);
        assert_eq!(recorder.fired.load(Ordering::Relaxed), 0);
    }
}
