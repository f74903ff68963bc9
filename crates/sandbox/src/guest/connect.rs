//! Connections to an agent. In a guest: through the VMM's vsock listener with `CONNECT <port>\n`,
//! answered by `OK <host port>\n` (the hybrid vsock handshake of Firecracker), then a plain byte
//! stream. Of a host pod: a Unix socket per port.

use std::io;
use std::path::PathBuf;

use agent_api::{CONTROL_PORT, FORWARD_PORT, STDIO_PORT};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Longest reply to a handshake, bytes: `OK 4294967295\n` and room.
const MAX_ANSWER: usize = 32;

/// Sockets of a host pod's agent, by port.
pub(crate) const SOCKETS: [(u32, &str); 3] =
    [(CONTROL_PORT, "control.sock"), (STDIO_PORT, "stdio.sock"), (FORWARD_PORT, "forward.sock")];

/// Address of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AgentAddress {
    /// The VMM's vsock listener.
    Vsock(PathBuf),
    /// A directory with [`SOCKETS`], on this host.
    Directory(PathBuf),
}

/// Connects to the agent's listener on `port`.
pub(crate) async fn connect(address: &AgentAddress, port: u32) -> io::Result<UnixStream> {
    match address {
        AgentAddress::Vsock(socket) => {
            let stream = UnixStream::connect(socket).await?;
            vsock_handshake(stream, port).await
        }
        AgentAddress::Directory(directory) => {
            let known = SOCKETS.iter().find(|(number, _)| *number == port);
            let (_, name) = known.ok_or(io::ErrorKind::AddrNotAvailable)?;
            UnixStream::connect(directory.join(name)).await
        }
    }
}

async fn vsock_handshake(mut stream: UnixStream, port: u32) -> io::Result<UnixStream> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    // Byte by byte: the data after the line belongs to the stream.
    let mut answer = Vec::with_capacity(MAX_ANSWER);
    loop {
        match stream.read_u8().await? {
            b'\n' => break,
            _ if answer.len() == MAX_ANSWER => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "vsock reply is too long"));
            }
            byte => answer.push(byte),
        }
    }
    if !answer.starts_with(b"OK ") {
        let text = String::from_utf8_lossy(&answer).into_owned();
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("vsock reply {text:?}")));
    }
    Ok(stream)
}
