#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use nacelle_fuzz::Guest;
use virtio::vsock::Vsock;

const CID: u64 = 3;
/// First host port that the device assigns to clients.
const HOST_PORT: u32 = 1 << 30;

/// A mostly valid packet with data.
fn packet(guest: &mut Guest, u: &mut Unstructured<'_>) -> Result<()> {
    let at = guest.address(u)?;
    let mut header = [0; 44];
    let cid = |u: &mut Unstructured<'_>, good: u64| -> Result<u64> {
        if u.ratio(1, 20)? { u.arbitrary() } else { Ok(good) }
    };
    header[..8].copy_from_slice(&cid(u, CID)?.to_le_bytes());
    header[8..16].copy_from_slice(&cid(u, 2)?.to_le_bytes());
    header[16..20].copy_from_slice(&u.int_in_range(1024..=1025u32)?.to_le_bytes());
    let port = HOST_PORT + u.int_in_range(0..=7u32)?;
    header[20..24].copy_from_slice(&port.to_le_bytes());
    let len = guest.length(u)?;
    header[24..28].copy_from_slice(&len.to_le_bytes());
    let kind = if u.ratio(1, 20)? { u.arbitrary()? } else { 1u16 };
    header[28..30].copy_from_slice(&kind.to_le_bytes());
    header[30..32].copy_from_slice(&u.int_in_range(0..=8u16)?.to_le_bytes());
    header[32..36].copy_from_slice(&u.int_in_range(0..=4u32)?.to_le_bytes());
    let alloc = if u.arbitrary()? { 1 << 16 } else { u.arbitrary::<u32>()? };
    header[36..40].copy_from_slice(&alloc.to_le_bytes());
    let forwarded = if u.arbitrary()? { 0 } else { u.arbitrary::<u32>()? };
    header[40..].copy_from_slice(&forwarded.to_le_bytes());
    guest.write(at, &header);
    let data = (guest.address(u)?, if u.arbitrary()? { len } else { guest.length(u)? });
    let queue = &mut guest.queues[1];
    if queue.room() >= 2 {
        queue.add(&[(at, 44), data], &[]);
        queue.kick();
    }
    Ok(())
}

fn receive_buffer(guest: &mut Guest, u: &mut Unstructured<'_>) -> Result<()> {
    let parts = [(guest.address(u)?, 44), (guest.address(u)?, guest.length(u)?)];
    let queue = &mut guest.queues[0];
    if queue.room() >= 2 {
        queue.add(&[], &parts);
        queue.kick();
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name =
        format!("nacelle-fuzz-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let address = SocketAddr::from_abstract_name(name).expect("a short name");
    let listener = UnixListener::bind_addr(&address).expect("a fresh name");
    let mut vsock = Vsock::new(CID, listener).expect("vsock");
    let mut clients: Vec<UnixStream> = Vec::new();
    nacelle_fuzz::play(data, &mut vsock, |guest, u| {
        match u.int_in_range(0..=11u8)? {
            0 if clients.len() < 8 => {
                let mut client = UnixStream::connect_addr(&address).expect("room in the backlog");
                client.set_nonblocking(true).expect("non-blocking");
                let line: &[u8] = if u.ratio(9, 10)? { b"CONNECT 1024\n" } else { u.bytes(5)? };
                let _ = client.write(line);
                clients.push(client);
                guest.runner.settle(4);
            }
            action @ 1..=4 if !clients.is_empty() => {
                let index = u.choose_index(clients.len())?;
                let client = &mut clients[index];
                match action {
                    1 => drop(clients.swap_remove(index)),
                    2 => {
                        let how = *u.choose(&[Shutdown::Read, Shutdown::Write, Shutdown::Both])?;
                        let _ = client.shutdown(how);
                    }
                    3 => {
                        let _ = client.write(&vec![7; usize::from(u.arbitrary::<u16>()?)]);
                    }
                    _ => {
                        let _ = client.read(&mut vec![0; usize::from(u.arbitrary::<u16>()?)]);
                    }
                }
            }
            5..=6 => receive_buffer(guest, u)?,
            _ => packet(guest, u)?,
        }
        Ok(())
    });
});
