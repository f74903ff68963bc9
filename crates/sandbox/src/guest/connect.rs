//! Reaching a port of an agent: in a guest through the VMM's vsock listener, `CONNECT <port>\n`,
//! answered by `OK <host port>\n` (the hybrid vsock handshake), then a plain byte stream; of a pod
//! without a VM at a socket of its own.

use std::io;
use std::path::PathBuf;

use agent_api::{CONTROL_PORT, FORWARD_PORT, STDIO_PORT};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Longest answer to a handshake, bytes: `OK 4294967295\n` and room. A broken VMM cannot make us
/// hold more.
const MAX_ANSWER: usize = 32;

/// Sockets of an agent without a VM, by port.
pub(crate) const SOCKETS: [(u32, &str); 3] =
    [(CONTROL_PORT, "control.sock"), (STDIO_PORT, "stdio.sock"), (FORWARD_PORT, "forward.sock")];

/// Where an agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Door {
    /// Behind a VMM's vsock listener.
    Vsock(PathBuf),
    /// On this host, with [`SOCKETS`] in a folder.
    Folder(PathBuf),
}

/// Joins a new stream to the agent's listener on `port`.
pub(crate) async fn connect(door: &Door, port: u32) -> io::Result<UnixStream> {
    match door {
        Door::Vsock(socket) => {
            let stream = UnixStream::connect(socket).await?;
            shake_hands(stream, port).await
        }
        Door::Folder(folder) => {
            let known = SOCKETS.iter().find(|(number, _)| *number == port);
            let (_, name) = known.ok_or(io::ErrorKind::AddrNotAvailable)?;
            UnixStream::connect(folder.join(name)).await
        }
    }
}

async fn shake_hands(mut stream: UnixStream, port: u32) -> io::Result<UnixStream> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    // Byte by byte: what follows the line belongs to the stream's user.
    let mut answer = Vec::with_capacity(MAX_ANSWER);
    loop {
        match stream.read_u8().await? {
            b'\n' => break,
            _ if answer.len() == MAX_ANSWER => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "vsock answer is too long"));
            }
            byte => answer.push(byte),
        }
    }
    if !answer.starts_with(b"OK ") {
        let text = String::from_utf8_lossy(&answer).into_owned();
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("vsock answer {text:?}")));
    }
    Ok(stream)
}
