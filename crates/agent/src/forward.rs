//! Port-forward: connects each connection on the forward port to a TCP port of the pod's loopback
//! interface (`agent_api::forward`).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use agent_api::forward::{LENGTH, Open, Status};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::listen::{Conn, Listener};

/// Maximum open connections. Each holds two sockets and two buffers, and their number is up to
/// clients of the host.
const MAX_CONNECTIONS: usize = 256;
/// Time for the header to arrive. No limit after the reply: a connection may be idle.
const HEADER_DEADLINE: Duration = Duration::from_secs(10);
/// Time for connect(2) to the loopback address; it waits only if the backlog is full.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// Size of the copy buffer of each direction, bytes.
const BUFFER: usize = 16 << 10;

/// Accepts connections; never returns.
pub async fn run(listener: Listener) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        match listener.accept().await {
            Ok(conn) => {
                let slot = Arc::clone(&slots).try_acquire_owned().ok();
                tokio::spawn(async move {
                    let result = match &slot {
                        Some(_) => serve(conn).await,
                        None => send_status(conn, Status::Failed).await,
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

async fn send_status(mut conn: Conn, status: Status) -> io::Result<()> {
    conn.write_all(&[status as u8]).await?;
    conn.shutdown().await
}

async fn serve(mut conn: Conn) -> io::Result<()> {
    let mut header = [0; LENGTH];
    match tokio::time::timeout(HEADER_DEADLINE, conn.read_exact(&mut header)).await {
        Ok(read) => read?,
        Err(_elapsed) => return send_status(conn, Status::BadHeader).await,
    };
    let Ok(Open { port }) = Open::decode(header) else {
        return send_status(conn, Status::BadHeader).await;
    };
    let mut stream = match connect(port).await {
        Ok(stream) => stream,
        Err(error) if is_refusal(&error) => return send_status(conn, Status::Refused).await,
        Err(error) => {
            tracing::info!(port, %error, "cannot forward a connection");
            return send_status(conn, Status::Failed).await;
        }
    };
    let _ = stream.set_nodelay(true);
    conn.write_all(&[Status::Ok as u8]).await?;
    // Propagates half-close in each direction and returns after both.
    tokio::io::copy_bidirectional_with_sizes(&mut conn, &mut stream, BUFFER, BUFFER).await?;
    Ok(())
}

/// Tries 127.0.0.1, then ::1, as a program may listen on one family only.
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

/// Whether no program listens, or the pod has no loopback address of this family.
fn is_refusal(error: &io::Error) -> bool {
    use io::ErrorKind::{AddrNotAvailable, ConnectionRefused, NetworkUnreachable};
    matches!(error.kind(), ConnectionRefused | AddrNotAvailable | NetworkUnreachable)
        || matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT))
}
