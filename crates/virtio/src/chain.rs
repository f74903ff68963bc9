//! A validated descriptor chain, and access to the guest memory it points to (virtio 1.2, sections
//! 2.7.4 and 2.7.5).
//!
//! Each descriptor is copied out of guest memory once, before it is checked, so a driver that
//! rewrites it concurrently has no effect. Only this module converts guest addresses of buffers to
//! host pointers.
#![allow(unsafe_code)] // writev from iovecs over guest memory

use virtio_queue::DescriptorChain;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// Most descriptors in one chain.
/// Attack: an indirect table of 65,535 entries per request, so that the host spends its time
/// copying tables. Linux uses at most 128 segments plus header and status.
pub const MAX_SEGMENTS: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    #[error("chain of more than {MAX_SEGMENTS} descriptors")]
    TooLong,
    #[error("buffer at {addr:#x} of {len} bytes is outside guest memory")]
    OutsideMemory { addr: u64, len: u32 },
    #[error("a device-readable buffer follows a device-writable one")]
    Order,
    #[error("all buffers of the chain are empty")]
    Empty,
}

/// A guest buffer that was checked to lie in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    addr: GuestAddress,
    len: usize,
}

/// The device-readable or the device-writable part of a chain, as one sequence of bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Buffer {
    segments: Vec<Segment>,
    len: usize,
}

/// A descriptor chain taken from a queue.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    /// Index of the first descriptor: the id in the used ring.
    pub head: u16,
    pub readable: Buffer,
    pub writable: Buffer,
}

impl Chain {
    /// Copies and checks a chain. `mem` limits it to the memory that devices may access.
    pub fn read<M: GuestMemory>(
        mem: &M,
        descriptors: DescriptorChain<&M>,
    ) -> Result<Self, ChainError> {
        let mut chain = Self { head: descriptors.head_index(), ..Self::default() };
        for (count, descriptor) in descriptors.enumerate() {
            if count >= MAX_SEGMENTS {
                return Err(ChainError::TooLong);
            }
            let (addr, len) = (descriptor.addr(), descriptor.len());
            if len == 0 {
                continue;
            }
            if !mem.check_range(addr, len as usize, Permissions::ReadWrite) {
                return Err(ChainError::OutsideMemory { addr: addr.0, len });
            }
            if descriptor.is_write_only() {
                chain.writable.push(addr, len as usize);
            } else if chain.writable.segments.is_empty() {
                chain.readable.push(addr, len as usize);
            } else {
                return Err(ChainError::Order);
            }
        }
        if chain.readable.segments.is_empty() && chain.writable.segments.is_empty() {
            return Err(ChainError::Empty);
        }
        Ok(chain)
    }
}

impl Buffer {
    fn push(&mut self, addr: GuestAddress, len: usize) {
        self.segments.push(Segment { addr, len });
        self.len += len;
    }

    /// Bytes in all segments; at most 4 GiB, as virtio-queue truncates a longer chain.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Guest address and length of each segment; checked to lie in guest memory.
    pub(crate) fn segments(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.segments.iter().map(|segment| (segment.addr.0, segment.len as u64))
    }

    /// Splits into the first `at` bytes and the rest.
    pub fn split_at(&self, at: usize) -> (Self, Self) {
        let (mut before, mut after) = (Self::default(), Self::default());
        for segment in &self.segments {
            let take = at.saturating_sub(before.len).min(segment.len);
            if take > 0 {
                before.push(segment.addr, take);
            }
            if take < segment.len {
                // Inside a segment that was checked to lie in guest memory: cannot overflow.
                after.push(GuestAddress(segment.addr.0 + take as u64), segment.len - take);
            }
        }
        (before, after)
    }

    /// Copies bytes from `offset` on into `out`; returns the number of bytes copied.
    pub fn read(&self, mem: &GuestMemoryMmap, offset: usize, out: &mut [u8]) -> usize {
        let mut done = 0;
        self.parts(offset, out.len(), |addr, len| {
            let copied = mem.read_slice(&mut out[done..done + len], addr).is_ok();
            done += if copied { len } else { 0 };
            copied
        });
        done
    }

    /// Copies `bytes` to `offset`; returns the number of bytes copied, fewer if the segments end.
    pub fn write(&self, mem: &GuestMemoryMmap, offset: usize, bytes: &[u8]) -> usize {
        let mut done = 0;
        self.parts(offset, bytes.len(), |addr, len| {
            let copied = mem.write_slice(&bytes[done..done + len], addr).is_ok();
            done += if copied { len } else { 0 };
            copied
        });
        done
    }

    /// Calls `part` for each contiguous piece of `[offset, offset + len)` until it returns `false`.
    fn parts(&self, offset: usize, len: usize, mut part: impl FnMut(GuestAddress, usize) -> bool) {
        let (mut skip, mut rest) = (offset, len);
        for segment in &self.segments {
            if rest == 0 {
                break;
            }
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            let take = (segment.len - skip).min(rest);
            if !part(GuestAddress(segment.addr.0 + skip as u64), take) {
                break;
            }
            rest -= take;
            skip = 0;
        }
    }

    /// Appends iovecs of the first `len` bytes to `out`.
    ///
    /// The pointers are valid as long as `mem` or a clone of it lives; a caller that passes them to
    /// the kernel keeps one until the kernel is done.
    pub fn iovecs(&self, mem: &GuestMemoryMmap, len: usize, out: &mut Vec<libc::iovec>) {
        self.parts(0, len, |addr, len| {
            let Ok(slices) = mem
                .get_slices(addr, len, Permissions::ReadWrite)
                .and_then(GuestMemorySliceIterator::stop_on_error)
            else {
                return false;
            };
            for slice in slices {
                let guard = slice.ptr_guard_mut();
                out.push(libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: slice.len() });
            }
            true
        });
    }

    /// Writes all bytes to `fd` with one `writev`; returns the bytes written.
    pub fn writev(
        &self,
        mem: &GuestMemoryMmap,
        fd: std::os::fd::RawFd,
        scratch: &mut Vec<libc::iovec>,
    ) -> std::io::Result<usize> {
        scratch.clear();
        self.iovecs(mem, self.len, scratch);
        let count = scratch.len().min(libc::UIO_MAXIOV as usize);
        // SAFETY: the iovecs point into guest memory that `mem` keeps mapped during the call, with
        // lengths checked against its regions by get_slices.
        let done = unsafe { libc::writev(fd, scratch.as_ptr(), count as libc::c_int) };
        usize::try_from(done).map_err(|_| std::io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use virtio_queue::QueueOwnedT;

    use super::*;
    use crate::mock::{MockQueue, memory};

    const END: u64 = 1 << 20;

    fn read(mem: &Arc<GuestMemoryMmap>, queue: &MockQueue) -> Result<Chain, ChainError> {
        let mut device = queue.queue(false);
        let descriptors = device.iter(&**mem).unwrap().next().unwrap();
        Chain::read(&**mem, descriptors)
    }

    fn chain(readable: &[(u64, u32)], writable: &[(u64, u32)]) -> Result<Chain, ChainError> {
        let mem = memory(END as usize);
        let mut queue = MockQueue::new(mem.clone(), 0x1000, 16);
        queue.add(readable, writable);
        read(&mem, &queue)
    }

    #[test]
    fn a_buffer_that_ends_one_byte_outside_memory_is_refused() {
        assert_eq!(chain(&[(END - 8, 8)], &[]).unwrap().readable.len(), 8);
        for (addr, len) in [(END - 8, 9), (END, 1), (u64::MAX, 1), (u64::MAX - 3, 8), (0, u32::MAX)]
        {
            let refused = chain(&[(addr, len)], &[]);
            assert_eq!(refused, Err(ChainError::OutsideMemory { addr, len }));
        }
    }

    #[test]
    fn empty_buffers_are_skipped_whatever_their_address() {
        let read = chain(&[(u64::MAX, 0), (0x8000, 4)], &[(END, 0)]).unwrap();
        assert_eq!((read.readable.len(), read.writable.len()), (4, 0));
        assert_eq!(chain(&[(0x8000, 0)], &[]), Err(ChainError::Empty));
    }

    #[test]
    fn a_readable_buffer_after_a_writable_one_is_refused() {
        let mem = memory(END as usize);
        let mut queue = MockQueue::new(mem.clone(), 0x1000, 16);
        queue.write_desc(0, 0x8000, 8, 3, 1);
        queue.write_desc(1, 0x9000, 8, 0, 0);
        queue.publish(0);
        assert_eq!(read(&mem, &queue), Err(ChainError::Order));
    }

    #[test]
    fn a_loop_of_descriptors_terminates() {
        let mem = memory(END as usize);
        let mut queue = MockQueue::new(mem.clone(), 0x1000, 16);
        queue.write_desc(0, 0x8000, 8, 1, 1);
        queue.write_desc(1, 0x9000, 8, 1, 0);
        queue.publish(0);
        assert_eq!(read(&mem, &queue).unwrap().readable.len(), 16 * 8);
    }

    #[test]
    fn an_indirect_table_longer_than_the_cap_is_refused() {
        let mem = memory(END as usize);
        let mut queue = MockQueue::new(mem.clone(), 0x1000, 16);
        let parts = vec![(0x8000, 1); MAX_SEGMENTS + 1];
        queue.add_indirect(0x10000, &parts, &[]);
        assert_eq!(read(&mem, &queue), Err(ChainError::TooLong));
        let mut queue = MockQueue::new(mem.clone(), 0x1000, 16);
        queue.add_indirect(0x10000, &parts[1..], &[]);
        assert_eq!(read(&mem, &queue).unwrap().readable.len(), MAX_SEGMENTS);
    }

    proptest! {
        /// A buffer behaves like one byte sequence, however it is split into segments.
        #[test]
        fn a_buffer_behaves_like_its_bytes(
            lens in prop::collection::vec(0u32..50, 1..8),
            at in 0usize..400,
            offset in 0usize..400,
            len in 0usize..400,
        ) {
            let mem = memory(END as usize);
            let mut buffer = Buffer::default();
            for (n, len) in lens.iter().enumerate() {
                buffer.push(GuestAddress(0x1000 * n as u64), *len as usize);
            }
            let model: Vec<u8> = (0..buffer.len()).map(|n| n as u8).collect();
            prop_assert_eq!(buffer.write(&mem, 0, &model), model.len());

            let (before, after) = buffer.split_at(at);
            let cut = at.min(model.len());
            prop_assert_eq!((before.len(), after.len()), (cut, model.len() - cut));
            let mut tail = vec![0; after.len()];
            prop_assert_eq!(after.read(&mem, 0, &mut tail), tail.len());
            prop_assert_eq!(&tail[..], &model[cut..]);

            let mut out = vec![0; len];
            let got = buffer.read(&mem, offset, &mut out);
            let wanted = model.get(offset..).unwrap_or(&[]);
            prop_assert_eq!(&out[..got], &wanted[..wanted.len().min(len)]);

            let mut iovecs = Vec::new();
            buffer.iovecs(&mem, len, &mut iovecs);
            let total: usize = iovecs.iter().map(|v| v.iov_len).sum();
            prop_assert_eq!(total, len.min(model.len()));
        }
    }
}
