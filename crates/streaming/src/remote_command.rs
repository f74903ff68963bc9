//! Exec and attach: connects a client's streams with a process and reports the result on the error
//! stream.
//!
//! ```text
//! streams opened -> process started -> copy -> process exited and its output drained
//!       |                |               |         -> status -> close
//!    timeout           error        client disconnected: all dropped, which kills an exec
//! ```

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::backend::{Backend, BackendError, ByteReader, ByteWriter, Session, StdinEnd};
use crate::io::{CHUNK, Incoming, Outgoing};
use crate::link::Link;
use crate::pending::Request;
use crate::resize::Sizes;
use crate::spdy::{self, Headers};
use crate::status::{Form, Outcome};
use crate::websocket::Channel;

/// SPDY header of a stream; names are in lower case.
const STREAM_TYPE: &str = "streamtype";
/// Time to wait for the client's terminal size before the process is started.
const FIRST_SIZE_WAIT: Duration = Duration::from_millis(100);

/// Number of channels of the WebSocket protocols.
pub(crate) const CHANNELS: u8 = 5;

/// The streams of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestedStreams {
    pub(crate) tty: bool,
    pub(crate) stdin: bool,
    pub(crate) stdout: bool,
    pub(crate) stderr: bool,
}

#[derive(Default)]
struct Client {
    stdin: Option<Incoming>,
    stdout: Option<Outgoing>,
    stderr: Option<Outgoing>,
    error: Option<Outgoing>,
    resize: Option<Incoming>,
    /// Sending directions of stdin and resize, which are only closed.
    inputs: Vec<Outgoing>,
}

pub(crate) fn accept(headers: &Headers) -> bool {
    let known = ["error", "stdin", "stdout", "stderr", "resize"];
    headers.get(STREAM_TYPE).is_some_and(|kind| known.contains(&kind))
}

/// A session over SPDY. `resizes`: the protocol has a resize stream.
pub(crate) async fn over_spdy(
    backend: &dyn Backend,
    request: Request,
    (link, streams): (Link, mpsc::Receiver<spdy::Stream>),
    (form, resizes): (Form, bool),
    creation_limit: Duration,
) {
    let Some(requested) = RequestedStreams::of(&request) else { return };
    let collected = tokio::select! {
        collected = tokio::time::timeout(creation_limit, collect(streams, requested, resizes)) => {
            collected
        }
        () = link.closed.cancelled() => return,
    };
    match collected {
        Ok(Some(client)) => serve(backend, request, client, &link, form).await,
        Ok(None) => return,
        Err(_) => tracing::debug!(?creation_limit, "the client did not open its streams in time"),
    }
    link.finish().await;
}

async fn collect(
    mut streams: mpsc::Receiver<spdy::Stream>,
    requested: RequestedStreams,
    resizes: bool,
) -> Option<Client> {
    let mut client = Client::default();
    loop {
        let missing = client.error.is_none()
            || requested.stdin && client.stdin.is_none()
            || requested.stdout && client.stdout.is_none()
            || requested.stderr && client.stderr.is_none()
            || requested.tty && resizes && client.resize.is_none();
        if !missing {
            return Some(client);
        }
        let spdy::Stream { headers, incoming, outgoing, .. } = streams.recv().await?;
        let Client { stdin, stdout, stderr, error, resize, inputs } = &mut client;
        match headers.get(STREAM_TYPE) {
            Some("error") if error.is_none() => *error = Some(outgoing),
            Some("stdin") if stdin.is_none() => {
                *stdin = Some(incoming);
                inputs.push(outgoing);
            }
            Some("stdout") if stdout.is_none() => *stdout = Some(outgoing),
            Some("stderr") if stderr.is_none() => *stderr = Some(outgoing),
            Some("resize") if resize.is_none() => {
                *resize = Some(incoming);
                inputs.push(outgoing);
            }
            kind => {
                tracing::debug!(?kind, "duplicate stream");
                outgoing.finish().await;
            }
        }
    }
}

/// A session over WebSocket channels: 0 to 2 are stdin, stdout, stderr; 3 is error, 4 is resize.
pub(crate) async fn over_websocket(
    backend: &dyn Backend,
    request: Request,
    (link, channels): (Link, Vec<Channel>),
    form: Form,
) {
    let Some(requested) = RequestedStreams::of(&request) else { return };
    let Ok([stdin, stdout, stderr, error, resize]) = <[Channel; 5]>::try_from(channels) else {
        return;
    };
    let client = Client {
        stdin: requested.stdin.then_some(stdin.incoming),
        stdout: requested.stdout.then_some(stdout.outgoing),
        stderr: requested.stderr.then_some(stderr.outgoing),
        error: Some(error.outgoing),
        resize: requested.tty.then_some(resize.incoming),
        inputs: Vec::new(),
    };
    // Signals the client that the connection is established, as kubelet does.
    let first = client.stdout.as_ref().or(client.stderr.as_ref()).or(client.error.as_ref());
    if let Some(first) = first {
        let _ = first.send(Bytes::new()).await;
    }
    serve(backend, request, client, &link, form).await;
    link.finish().await;
}

impl RequestedStreams {
    fn of(request: &Request) -> Option<RequestedStreams> {
        match request {
            Request::Exec(p) => Some(RequestedStreams {
                tty: p.tty,
                stdin: p.stdin,
                stdout: p.stdout,
                stderr: p.stderr,
            }),
            Request::Attach(p) => Some(RequestedStreams {
                tty: p.tty,
                stdin: p.stdin,
                stdout: p.stdout,
                stderr: p.stderr,
            }),
            Request::PortForward(_) => None,
        }
    }
}

async fn serve(backend: &dyn Backend, request: Request, client: Client, link: &Link, form: Form) {
    let Client { stdin, stdout, stderr, error, resize, inputs } = client;
    let session = run(backend, request, stdin, [&stdout, &stderr], Sizes::new(resize));
    let outcome = tokio::select! {
        outcome = session => outcome,
        () = link.closed.cancelled() => return,
    };
    let end = async {
        for output in [stdout, stderr].into_iter().flatten() {
            output.finish().await;
        }
        if let Some(error) = error {
            let status = outcome.encode(form);
            if !status.is_empty() {
                let _ = error.send(status).await;
            }
            error.finish().await;
        }
        for input in inputs {
            input.finish().await;
        }
    };
    tokio::select! {
        () = end => {}
        () = link.closed.cancelled() => {}
    }
}

/// Runs the process. After it returns, all output is queued and the session is dropped.
async fn run(
    backend: &dyn Backend,
    request: Request,
    stdin: Option<Incoming>,
    [stdout, stderr]: [&Option<Outgoing>; 2],
    mut sizes: Sizes,
) -> Outcome {
    let tty = RequestedStreams::of(&request).is_some_and(|requested| requested.tty);
    let size = match tty {
        true => tokio::time::timeout(FIRST_SIZE_WAIT, sizes.next()).await.ok(),
        false => None,
    };
    let attached = matches!(request, Request::Attach(_));
    let started = match request {
        Request::Exec(params) => backend
            .exec(params, size)
            .await
            .map_err(|e| format!("error executing command in container: {e}")),
        Request::Attach(params) => backend
            .attach(params, size)
            .await
            .map_err(|e| format!("error attaching to container: {e}")),
        Request::PortForward(_) => Err("not a command".to_owned()),
    };
    let mut session = match started {
        Ok(session) => session,
        Err(error) => return Outcome::Failed(error),
    };
    let has_output = session.stdout.is_some() || session.stderr.is_some();
    let stdin_end = session.stdin_end;
    let input = input(stdin, session.stdin.take(), stdin_end);
    let (out, err) = (session.stdout.take(), session.stderr.take());
    let outputs = async {
        let (out, err) = tokio::join!(output(out, stdout), output(err, stderr));
        // Part of the output must not be taken for all of it.
        out.and(err).map_err(|e| format!("output of the process is lost: {e}"))
    };
    let wait_and_resize = wait_and_resize(&mut session, &mut sizes);
    let over = async {
        if !attached {
            let (end, read) = tokio::join!(wait_and_resize, outputs);
            return match (end, read) {
                (Ok(code), Ok(())) => Outcome::Exited(code),
                (Ok(_), Err(lost)) => Outcome::Failed(lost),
                (Err(e), _) => {
                    Outcome::Failed(format!("error executing command in container: {e}"))
                }
            };
        }
        tokio::pin!(outputs);
        let read = tokio::select! {
            read = &mut outputs, if has_output => read,
            // Output that was written before the exit is still sent.
            _ = wait_and_resize => outputs.await,
        };
        read.map_or_else(Outcome::Failed, |()| Outcome::Done)
    };
    tokio::select! {
        outcome = over => outcome,
        () = input => Outcome::Done,
    }
}

/// Waits for the exit of the process; applies new terminal sizes meanwhile.
async fn wait_and_resize(session: &mut Session, sizes: &mut Sizes) -> Result<i32, BackendError> {
    loop {
        let size = tokio::select! {
            code = session.process.wait() => return code,
            size = sizes.next() => size,
        };
        if let Err(error) = session.process.resize(size).await {
            tracing::debug!(%error, ?size, "cannot resize the terminal");
        }
    }
}

/// Copies the client's input. Returns at its end only if that ends the session.
async fn input(from: Option<Incoming>, to: Option<ByteWriter>, at_end: StdinEnd) {
    let (Some(mut from), Some(mut to)) = (from, to) else {
        // Input is discarded and its end ignored.
        return std::future::pending().await;
    };
    while let Ok(Some(chunk)) = from.next().await {
        let written = async {
            to.write_all(&chunk).await?;
            to.flush().await
        };
        if let Err(error) = written.await {
            tracing::debug!(%error, "cannot write to the process' stdin");
            drop(from);
            return std::future::pending().await;
        }
    }
    if at_end == StdinEnd::Detach {
        return;
    }
    if let Err(error) = to.shutdown().await {
        tracing::debug!(%error, "cannot shut down stdin");
    }
    // A pipe is closed by the drop.
    drop(to);
    std::future::pending::<()>().await;
}

/// Copies a process's output to its end. Output that the client did not request is read and dropped,
/// otherwise the process would block.
async fn output(from: Option<ByteReader>, to: &Option<Outgoing>) -> std::io::Result<()> {
    let Some(mut from) = from else { return Ok(()) };
    let mut to = to.as_ref();
    let mut bytes = BytesMut::new();
    loop {
        bytes.reserve(CHUNK);
        if from.read_buf(&mut bytes).await? == 0 {
            return Ok(());
        }
        let chunk = bytes.split().freeze();
        if let Some(client) = to
            && client.send(chunk).await.is_err()
        {
            to = None;
        }
    }
}
