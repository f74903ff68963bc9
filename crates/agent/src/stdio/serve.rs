//! Connections on the stdio port: header, status, then bytes (`agent_api::stdio`).

use std::sync::Arc;
use std::time::Duration;

use agent_api::stdio::{FIXED, FRAME_HEADER, Kind, Open, Status};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Semaphore;

use super::input::Input;
use super::output::{Next, Output};
use crate::agent::Agent;
use crate::listen::{Conn, Listener};

/// Maximum open connections: bounds the guest memory that a host can use up.
const MAX_CONNECTIONS: usize = 4096;
/// Time for the header to arrive.
const HEADER_DEADLINE: Duration = Duration::from_secs(10);
/// Time to read acknowledgements that are still in a connection which broke or was replaced.
const LAST_ACKNOWLEDGEMENTS: Duration = Duration::from_secs(1);
/// Maximum bytes of one read from the host.
const INPUT_CHUNK: usize = 32 << 10;

/// Accepts connections; never returns.
pub async fn run(listener: Listener, agent: Arc<Agent>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok(conn) => {
                let agent = Arc::clone(&agent);
                tokio::spawn(async move {
                    if let Err(error) = serve(conn, &agent).await {
                        tracing::debug!(%error, "stream connection ended");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a stream connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn read_header(conn: &mut Conn) -> std::io::Result<Result<Open, Status>> {
    let mut fixed = [0; FIXED];
    conn.read_exact(&mut fixed).await?;
    let Ok((a, b)) = Open::id_lengths(&fixed) else { return Ok(Err(Status::BadHeader)) };
    let mut ids = vec![0; a + b];
    conn.read_exact(&mut ids).await?;
    Ok(Open::decode(&fixed, &ids).map_err(|_| Status::BadHeader))
}

async fn refuse(mut conn: Conn, status: Status) -> std::io::Result<()> {
    conn.write_all(&[status as u8]).await?;
    conn.shutdown().await
}

async fn serve(mut conn: Conn, agent: &Agent) -> std::io::Result<()> {
    let header = tokio::time::timeout(HEADER_DEADLINE, read_header(&mut conn)).await;
    let open = match header {
        Ok(Ok(Ok(open))) => open,
        Ok(Ok(Err(status))) => return refuse(conn, status).await,
        Ok(Err(error)) => return Err(error),
        Err(_elapsed) => return refuse(conn, Status::BadHeader).await,
    };
    match open.kind {
        Kind::Stdin => match agent.input(&open.container_id, &open.exec_id) {
            Some(input) => serve_input(conn, &input).await,
            None => refuse(conn, Status::NoSuchStream).await,
        },
        Kind::Stdout | Kind::Stderr => {
            let stderr = open.kind == Kind::Stderr;
            let Some(output) = agent.output(&open.container_id, &open.exec_id, stderr) else {
                return refuse(conn, Status::NoSuchStream).await;
            };
            let Ok(connection) = output.attach(open.offset) else {
                return refuse(conn, Status::BadOffset).await;
            };
            let from = OutputRequest { connection, offset: open.offset, framed: open.framed };
            let result = serve_output(conn, &output, from).await;
            output.detach(connection);
            agent.remove_collected_execs();
            result
        }
    }
}

async fn serve_input(mut conn: Conn, input: &Input) -> std::io::Result<()> {
    let connection = input.attach();
    conn.write_all(&[Status::Ok as u8]).await?;
    let mut buffer = vec![0; INPUT_CHUNK];
    loop {
        let changed = input.changed();
        if !input.is_current(connection) {
            return Ok(());
        }
        let forward = async {
            let n = conn.read(&mut buffer).await?;
            // After the process closed its stdin this fails, and the connection is closed.
            input.write(&buffer[..n]).await?;
            Ok::<_, std::io::Error>(n)
        };
        tokio::select! {
            forwarded = forward => {
                if forwarded? == 0 {
                    input.end(connection);
                    return Ok(());
                }
            }
            () = changed => {}
        }
    }
}

/// Parameters of an output connection.
struct OutputRequest {
    connection: u64,
    offset: u64,
    framed: bool,
}

async fn serve_output(conn: Conn, output: &Output, from: OutputRequest) -> std::io::Result<()> {
    let (mut read, mut write) = tokio::io::split(conn);
    write.write_all(&[Status::Ok as u8]).await?;
    // One future for the whole connection: dropping it between two `select!`s could lose half an
    // offset. Acknowledgements are read until the host closes the connection.
    let mut acknowledgements = std::pin::pin!(acknowledge(&mut read, output));
    tokio::select! {
        result = &mut acknowledgements => result,
        result = send(&mut write, output, from) => match result {
            Ok(Sent::All) => acknowledgements.await,
            // Pending acknowledgements still count: the host's next connection may start behind
            // them and wait for the room they free.
            result => {
                let _ = tokio::time::timeout(LAST_ACKNOWLEDGEMENTS, acknowledgements).await;
                result.map(|_| ())
            }
        },
    }
}

enum Sent {
    All,
    Replaced,
}

async fn send(
    write: &mut (impl AsyncWrite + Unpin),
    output: &Output,
    from: OutputRequest,
) -> std::io::Result<Sent> {
    let OutputRequest { connection, mut offset, framed } = from;
    let (mut buffer, mut frame) = (Vec::new(), Vec::new());
    loop {
        let mut changed = std::pin::pin!(output.changed());
        // Enabled before the check, so that a notification in between is not lost.
        changed.as_mut().enable();
        match output.next(connection, offset, &mut buffer) {
            Next::Bytes(n) => {
                if framed {
                    // Length and bytes in one write, so in one vsock packet.
                    frame.clear();
                    frame.extend_from_slice(&(n as u32).to_le_bytes());
                    frame.extend_from_slice(&buffer[..n]);
                    write.write_all(&frame).await?;
                } else {
                    write.write_all(&buffer[..n]).await?;
                }
                offset += n as u64;
            }
            Next::Wait => {
                (buffer, frame) = (Vec::new(), Vec::new());
                changed.await;
            }
            Next::End => {
                if framed {
                    write.write_all(&[0; FRAME_HEADER]).await?;
                }
                write.shutdown().await?;
                return Ok(Sent::All);
            }
            Next::Replaced => return Ok(Sent::Replaced),
        }
    }
}

async fn acknowledge(read: &mut (impl AsyncRead + Unpin), output: &Output) -> std::io::Result<()> {
    loop {
        let mut ack = [0; 8];
        if let Err(error) = read.read_exact(&mut ack).await {
            return if error.kind() == std::io::ErrorKind::UnexpectedEof {
                Ok(())
            } else {
                Err(error)
            };
        }
        if output.acknowledge(u64::from_le_bytes(ack)).is_err() {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use agent_api::stdio::{MAX_FRAME, WINDOW};

    use super::*;
    use crate::stdio::channel;

    /// Records each write.
    #[derive(Default)]
    struct Writes(Vec<Vec<u8>>);

    impl AsyncWrite for Writes {
        fn poll_write(
            mut self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            bytes: &[u8],
        ) -> std::task::Poll<std::io::Result<usize>> {
            self.0.push(bytes.to_vec());
            std::task::Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<std::io::Result<()>> {
            std::task::Poll::Ready(Ok(()))
        }

        fn poll_shutdown(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<std::io::Result<()>> {
            std::task::Poll::Ready(Ok(()))
        }
    }

    /// Returns the writes for a stream of 200,000 bytes, its content, and the result.
    async fn written(framed: bool, replaced: bool) -> (Vec<Vec<u8>>, Vec<u8>, Sent) {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let content: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
        let bytes = content.clone();
        let writer = std::thread::spawn(move || {
            use std::io::Write;
            std::fs::File::from(write).write_all(&bytes).unwrap();
        });
        let output = Output::start(channel(read).unwrap());
        let connection = output.attach(0).unwrap();
        if replaced {
            output.attach(0).unwrap();
        }
        let mut writes = Writes::default();
        let sent = send(&mut writes, &output, OutputRequest { connection, offset: 0, framed })
            .await
            .unwrap();
        if !replaced {
            writer.join().unwrap();
        }
        (writes.0, content, sent)
    }

    #[tokio::test]
    async fn acknowledgements_on_a_replaced_connection_make_room() {
        /// Offset of the last byte that fits into the window at first.
        const LAST: u64 = WINDOW as u64 - 1;
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let writer = std::thread::spawn(move || {
            use std::io::Write;
            std::fs::File::from(write).write_all(&vec![7; 2 * WINDOW]).unwrap();
        });
        let output = Output::start(channel(read).unwrap());
        let (mut host, guest) = tokio::net::UnixStream::pair().unwrap();
        let connection = output.attach(0).unwrap();
        let mut filled = vec![0];
        while matches!(output.next(connection, LAST, &mut filled), Next::Wait) {
            tokio::task::yield_now().await;
        }
        let next = output.attach(0).unwrap();
        // The replacement is noticed before the acknowledgement arrives.
        let host = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(100)).await;
            host.write_all(&(LAST + 1).to_le_bytes()).await.unwrap();
            host
        });
        let from = OutputRequest { connection, offset: 0, framed: true };
        serve_output(Conn::Unix(guest), &output, from).await.unwrap();
        drop(host.await.unwrap());
        tokio::time::timeout(Duration::from_secs(20), async {
            while matches!(output.next(next, LAST + WINDOW as u64, &mut filled), Next::Wait) {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("the copy task waits for room");
        writer.join().unwrap();
    }

    #[tokio::test]
    async fn only_the_end_of_a_stream_has_an_end_frame_and_writes_are_small() {
        let (writes, content, sent) = written(true, false).await;
        assert!(matches!(sent, Sent::All));
        let mut got = Vec::new();
        let (last, frames) = writes.split_last().unwrap();
        for write in frames {
            let (length, bytes) = write.split_at(FRAME_HEADER);
            assert_eq!(u32::from_le_bytes(length.try_into().unwrap()) as usize, bytes.len());
            assert!((1..=MAX_FRAME).contains(&bytes.len()) && write.len() <= 28 << 10);
            got.extend_from_slice(bytes);
        }
        assert_eq!(last, &[0; FRAME_HEADER]);
        assert!(got == content);
        // A replaced connection gets no end frame.
        let (writes, _, sent) = written(true, true).await;
        assert!(matches!(sent, Sent::Replaced) && writes.is_empty());
        // Without framing only the bytes are sent.
        let (writes, content, _) = written(false, false).await;
        assert!(writes.iter().all(|write| write.len() <= 28 << 10));
        assert!(writes.concat() == content);
    }
}
