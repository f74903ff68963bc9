//! Answers requests with ENOTCONN after the back end has exited, as FUSE does for a file system
//! whose server has exited. Without an answer the guest's process would hang uninterruptibly
//! forever.

use vm_memory::GuestMemoryMmap;

use super::spec::{FUSE_IN_UNIQUE, FUSE_OUT_LEN};
use crate::chain::Chain;

/// Answers a request; returns the bytes written. Requests without an answer (FORGET) have no
/// writable buffer.
pub(super) fn refuse(mem: &GuestMemoryMmap, chain: &Chain) -> u32 {
    let mut unique = [0; 8];
    if chain.readable.read(mem, FUSE_IN_UNIQUE, &mut unique) < unique.len() {
        return 0;
    }
    if chain.writable.len() < FUSE_OUT_LEN {
        return 0;
    }
    let mut answer = [0; FUSE_OUT_LEN];
    answer[..4].copy_from_slice(&(FUSE_OUT_LEN as u32).to_le_bytes());
    answer[4..8].copy_from_slice(&(-libc::ENOTCONN).to_le_bytes());
    answer[8..].copy_from_slice(&unique);
    chain.writable.write(mem, 0, &answer) as u32
}
