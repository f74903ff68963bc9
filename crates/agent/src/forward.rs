//! Forwarded connections: each of the host's connections on the forward port is joined to a port
//! of the pod's loopback interface (see `agent_api::forward`).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use agent_api::forward::{LENGTH, Open, Status};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::listen::{Conn, Listener};

/// Connections at once: each holds two sockets and two buffers, and clients behind the host may
/// open them without end.
const MAX_CONNECTIONS: usize = 256;
/// For the header to arrive; after the answer a connection may be silent as long as it likes.
const HEADER_DEADLINE: Duration = Duration::from_secs(10);
/// For a connection to the pod's own loopback: only a full backlog makes one wait.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// Bytes under way in each direction of a connection.
const BUFFER: usize = 16 << 10;

/// Serves for ever.
pub async fn run(listener: Listener) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        match listener.accept().await {
            Ok(conn) => {
                let slot = Arc::clone(&slots).try_acquire_owned().ok();
                tokio::spawn(async move {
                    let result = match &slot {
                        Some(_) => serve(conn).await,
                        None => answer(conn, Status::Failed).await,
                    };
                    if let Err(error) = result {
                        tracing::debug!(%error, "forwarded connection ended");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a forwarded connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(mut conn: Conn, status: Status) -> io::Result<()> {
    conn.write_all(&[status as u8]).await?;
    conn.shutdown().await
}

async fn serve(mut conn: Conn) -> io::Result<()> {
    let mut header = [0; LENGTH];
    match tokio::time::timeout(HEADER_DEADLINE, conn.read_exact(&mut header)).await {
        Ok(read) => read?,
        Err(_elapsed) => return answer(conn, Status::BadHeader).await,
    };
    let Ok(Open { port }) = Open::decode(header) else {
        return answer(conn, Status::BadHeader).await;
    };
    let mut stream = match connect(port).await {
        Ok(stream) => stream,
        Err(error) if is_refusal(&error) => return answer(conn, Status::Refused).await,
        Err(error) => {
            tracing::info!(port, %error, "cannot forward a connection");
            return answer(conn, Status::Failed).await;
        }
    };
    let _ = stream.set_nodelay(true);
    conn.write_all(&[Status::Ok as u8]).await?;
    // Passes each direction's end on by itself, and ends with the second.
    tokio::io::copy_bidirectional_with_sizes(&mut conn, &mut stream, BUFFER, BUFFER).await?;
    Ok(())
}

/// A program may listen on one family only; IPv4 first, as kubectl's users expect.
async fn connect(port: u16) -> io::Result<TcpStream> {
    let first = connect_to(Ipv4Addr::LOCALHOST.into(), port).await;
    match first {
        Err(error) if is_refusal(&error) => connect_to(Ipv6Addr::LOCALHOST.into(), port).await,
        other => other,
    }
}

async fn connect_to(address: IpAddr, port: u16) -> io::Result<TcpStream> {
    match tokio::time::timeout(CONNECT_DEADLINE, TcpStream::connect((address, port))).await {
        Ok(result) => result,
        Err(_elapsed) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Nobody listens, or the pod has no loopback of this family.
fn is_refusal(error: &io::Error) -> bool {
    use io::ErrorKind::{AddrNotAvailable, ConnectionRefused, NetworkUnreachable};
    matches!(error.kind(), ConnectionRefused | AddrNotAvailable | NetworkUnreachable)
        || matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT))
}
