//! Exec and attach: joins a client's streams to a session's, and tells the end on the error
//! stream.
//!
//! ```text
//! streams there -> process started -> bytes flow -> process over and its output read to the end
//!       |                |                |              -> status -> goodbye
//!    too late          refused          client gone: everything dropped, which kills an exec
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

/// Header of a SPDY stream, in lower case as all of them.
const STREAM_TYPE: &str = "streamtype";
/// How long a terminal's process may wait for the client to tell its size.
const FIRST_SIZE_WAIT: Duration = Duration::from_millis(100);

/// Channels of the WebSocket protocols, by number.
pub(crate) const CHANNELS: u8 = 5;

/// The streams that a client asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
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
    /// The sending ends of streams that only the client writes to.
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
    let Some(wanted) = Wanted::of(&request) else { return };
    let collected = tokio::select! {
        collected = tokio::time::timeout(creation_limit, collect(streams, wanted, resizes)) => {
            collected
        }
        () = link.gone.cancelled() => return,
    };
    match collected {
        Ok(Some(client)) => serve(backend, request, client, &link, form).await,
        Ok(None) => return,
        Err(_) => tracing::debug!(?creation_limit, "client did not open the streams it asked for"),
    }
    link.finish().await;
}

async fn collect(
    mut streams: mpsc::Receiver<spdy::Stream>,
    wanted: Wanted,
    resizes: bool,
) -> Option<Client> {
    let mut client = Client::default();
    loop {
        let missing = client.error.is_none()
            || wanted.stdin && client.stdin.is_none()
            || wanted.stdout && client.stdout.is_none()
            || wanted.stderr && client.stderr.is_none()
            || wanted.tty && resizes && client.resize.is_none();
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
                tracing::debug!(?kind, "stream is there already");
                outgoing.finish().await;
            }
        }
    }
}

/// A session over WebSocket channels: 0 to 2 are the process's, 3 errors, 4 resizes.
pub(crate) async fn over_websocket(
    backend: &dyn Backend,
    request: Request,
    (link, channels): (Link, Vec<Channel>),
    form: Form,
) {
    let Some(wanted) = Wanted::of(&request) else { return };
    let Ok([stdin, stdout, stderr, error, resize]) = <[Channel; 5]>::try_from(channels) else {
        return;
    };
    let client = Client {
        stdin: wanted.stdin.then_some(stdin.incoming),
        stdout: wanted.stdout.then_some(stdout.outgoing),
        stderr: wanted.stderr.then_some(stderr.outgoing),
        error: Some(error.outgoing),
        resize: wanted.tty.then_some(resize.incoming),
        inputs: Vec::new(),
    };
    // Tells the client that the connection is made.
    let first = client.stdout.as_ref().or(client.stderr.as_ref()).or(client.error.as_ref());
    if let Some(first) = first {
        let _ = first.send(Bytes::new()).await;
    }
    serve(backend, request, client, &link, form).await;
    link.finish().await;
}

impl Wanted {
    fn of(request: &Request) -> Option<Wanted> {
        match request {
            Request::Exec(p) => {
                Some(Wanted { tty: p.tty, stdin: p.stdin, stdout: p.stdout, stderr: p.stderr })
            }
            Request::Attach(p) => {
                Some(Wanted { tty: p.tty, stdin: p.stdin, stdout: p.stdout, stderr: p.stderr })
            }
            Request::PortForward(_) => None,
        }
    }
}

async fn serve(backend: &dyn Backend, request: Request, client: Client, link: &Link, form: Form) {
    let Client { stdin, stdout, stderr, error, resize, inputs } = client;
    let session = run(backend, request, stdin, [&stdout, &stderr], Sizes::new(resize));
    let outcome = tokio::select! {
        outcome = session => outcome,
        () = link.gone.cancelled() => return,
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
        () = link.gone.cancelled() => {}
    }
}

/// When it returns, all output is on its way to the client and the session is dropped.
async fn run(
    backend: &dyn Backend,
    request: Request,
    stdin: Option<Incoming>,
    [stdout, stderr]: [&Option<Outgoing>; 2],
    mut sizes: Sizes,
) -> Outcome {
    let tty = Wanted::of(&request).is_some_and(|wanted| wanted.tty);
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
        // A part of the output must not be taken for all of it.
        out.and(err).map_err(|e| format!("output of the process is lost: {e}"))
    };
    let life = life(&mut session, &mut sizes);
    let over = async {
        if !attached {
            let (end, read) = tokio::join!(life, outputs);
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
            // What was written before the end still comes.
            _ = life => outputs.await,
        };
        read.map_or_else(Outcome::Failed, |()| Outcome::Done)
    };
    tokio::select! {
        outcome = over => outcome,
        () = input => Outcome::Done,
    }
}

/// The process until its end, resized meanwhile.
async fn life(session: &mut Session, sizes: &mut Sizes) -> Result<i32, BackendError> {
    loop {
        let size = tokio::select! {
            code = session.process.wait() => return code,
            size = sizes.next() => size,
        };
        if let Err(error) = session.process.resize(size).await {
            tracing::debug!(%error, ?size, "terminal is not resized");
        }
    }
}

/// Resolves at the client's end of input if that ends the session.
async fn input(from: Option<Incoming>, to: Option<ByteWriter>, at_end: StdinEnd) {
    let (Some(mut from), Some(mut to)) = (from, to) else {
        // What comes is discarded, and its end means nothing.
        return std::future::pending().await;
    };
    while let Ok(Some(chunk)) = from.next().await {
        let written = async {
            to.write_all(&chunk).await?;
            to.flush().await
        };
        if let Err(error) = written.await {
            tracing::debug!(%error, "process takes no more input");
            drop(from);
            return std::future::pending().await;
        }
    }
    if at_end == StdinEnd::Detach {
        return;
    }
    if let Err(error) = to.shutdown().await {
        tracing::debug!(%error, "end of input");
    }
    // Of a pipe, only this is the end.
    drop(to);
    std::future::pending::<()>().await;
}

/// Reads a process's output to its end. What the client does not want is read all the same: the
/// process would hang.
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
