//! Reaching a port of the guest through the VMM's vsock listener: `CONNECT <port>\n`, answered by
//! `OK <host port>\n` (the hybrid vsock handshake), then a plain byte stream.

use std::io;
use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Longest answer to a handshake, bytes: `OK 4294967295\n` and room. A broken VMM cannot make us
/// hold more.
const MAX_ANSWER: usize = 32;

/// Joins a new stream to the guest's listener on `port`.
pub(crate) async fn connect(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).await?;
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
