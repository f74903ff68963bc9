//! Test clients, for this crate and end-to-end tests: SPDY, WebSocket (with tungstenite) and plain
//! HTTP. They panic if the server misbehaves.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{SinkExt, Stream, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{self, Message};

use crate::ByteStream;
use crate::spdy::frame::{Decoder, FLAG_FIN, Frame, kind};
use crate::spdy::headers::Deflater;

/// Timeout of all operations.
const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, what).await.expect("done within the deadline")
}

/// Pseudo-random bytes, so that a lost or duplicated chunk is detected.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let message = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    message.flatten().take(length).collect()
}

pub(crate) fn address(url: &str) -> SocketAddr {
    let rest = url.split_once("://").unwrap().1;
    rest.split('/').next().unwrap().parse().unwrap()
}

pub(crate) fn path(url: &str) -> &str {
    let rest = url.split_once("://").unwrap().1;
    &rest[rest.find('/').unwrap()..]
}

/// Head of an HTTP response.
#[derive(Debug)]
pub struct Head {
    pub status: u16,
    text: String,
}

impl Head {
    pub fn headers(&self, name: &str) -> Vec<&str> {
        let lines = self.text.lines().skip(1).filter_map(|line| line.split_once(": "));
        lines.filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value).collect()
    }
}

/// Sends a request with headers and reads the head of the response.
pub(crate) async fn request(
    socket: &mut ByteStream,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
) -> Head {
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: host\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    text += "\r\n";
    let _ = socket.write_all(text.as_bytes()).await;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(within(socket.read_u8()).await.expect("a whole head"));
    }
    let text = String::from_utf8(head).unwrap();
    Head { status: text.split(' ').nth(1).unwrap().parse().unwrap(), text }
}

pub(crate) async fn connect(url: &str) -> ByteStream {
    Box::pin(TcpStream::connect(address(url)).await.unwrap())
}

/// Sends a request on a new connection; returns head and body.
pub async fn fetch(url: &str, method: &str, headers: &[(&str, &str)]) -> (Head, String) {
    let mut socket = connect(url).await;
    let head = request(&mut socket, method, path(url), headers).await;
    let mut body = String::new();
    if head.status != 101 {
        within(socket.read_to_string(&mut body)).await.unwrap();
    }
    (head, body)
}

pub fn spdy_upgrade(protocol: &str) -> [(&str, &str); 3] {
    [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("X-Stream-Protocol-Version", protocol)]
}

pub struct Spdy {
    pub(crate) socket: ByteStream,
    decoder: Decoder,
    bytes: BytesMut,
    deflater: Deflater,
    next_id: u32,
}

impl Spdy {
    pub async fn connect(url: &str, protocol: &str) -> Spdy {
        Spdy::over(connect(url).await, url, protocol).await
    }

    pub(crate) async fn over(mut socket: ByteStream, url: &str, protocol: &str) -> Spdy {
        let head = request(&mut socket, "POST", path(url), &spdy_upgrade(protocol)).await;
        assert_eq!(head.status, 101, "{head:?}");
        assert_eq!(head.headers("upgrade"), ["SPDY/3.1"]);
        assert_eq!(head.headers("x-stream-protocol-version"), [protocol]);
        Spdy::raw(socket)
    }

    pub(crate) fn raw(socket: ByteStream) -> Spdy {
        Spdy {
            socket,
            decoder: Decoder::new(1 << 20, 1 << 20),
            bytes: BytesMut::new(),
            deflater: Deflater::new(),
            next_id: 1,
        }
    }

    /// Connects with SPDY inside of a WebSocket.
    pub async fn through_websocket(url: &str, protocol: &str) -> Spdy {
        let Websocket(websocket) = Websocket::connect(url, protocol).await;
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        tokio::spawn(async move {
            let (mut sink, mut stream) = websocket.split();
            let (mut inside, mut outside) = tokio::io::split(theirs);
            let out = async {
                let mut buffer = vec![0; 8 << 10];
                loop {
                    match inside.read(&mut buffer).await {
                        Ok(n @ 1..) => {
                            // Message boundaries have no meaning.
                            for part in buffer[..n].chunks(1001) {
                                sink.send(Message::binary(part.to_vec())).await.unwrap();
                            }
                        }
                        _ => return,
                    }
                }
            };
            let back = async {
                while let Some(Ok(message)) = stream.next().await {
                    if let Message::Binary(bytes) = message {
                        outside.write_all(&bytes).await.unwrap();
                    }
                }
            };
            tokio::select! { () = out => {} () = back => {} }
        });
        let stream: ByteStream = Box::pin(ours);
        Spdy::raw(stream)
    }

    /// Opens the streams of exec or attach, in the order of kubectl: error first.
    pub async fn open_all(&mut self, kinds: &[&'static str]) -> HashMap<&'static str, u32> {
        let mut ids = HashMap::new();
        for kind in kinds {
            ids.insert(*kind, self.open(&[("streamtype", kind)]).await);
        }
        ids
    }

    pub(crate) async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let id = self.next_id;
        self.next_id += 2;
        self.open_with_id(id, headers).await;
        id
    }

    pub(crate) async fn open_with_id(&mut self, id: u32, headers: &[(&str, &str)]) {
        let block = self.deflater.deflate(headers);
        let mut payload = BytesMut::new();
        payload.put_u32(id);
        payload.put_bytes(0, 6);
        payload.put_slice(&block);
        self.control(kind::SYN_STREAM, &payload).await;
    }

    pub(crate) async fn control(&mut self, kind: u16, payload: &[u8]) {
        let mut frame = BytesMut::new();
        frame.put_u16(0x8003);
        frame.put_u16(kind);
        frame.put_u32(payload.len() as u32);
        frame.put_slice(payload);
        self.socket.write_all(&frame).await.unwrap();
    }

    pub async fn reset(&mut self, id: u32) {
        let mut payload = BytesMut::new();
        payload.put_u32(id);
        payload.put_u32(5);
        self.control(kind::RST_STREAM, &payload).await;
    }

    pub async fn send(&mut self, id: u32, data: &[u8], end: bool) {
        self.socket.write_all(&data_frame(id, data, end)).await.unwrap();
    }

    pub(crate) async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.decode(&mut self.bytes).unwrap() {
                return Some(frame);
            }
            match within(self.socket.read_buf(&mut self.bytes)).await {
                Ok(1..) => {}
                Ok(0) | Err(_) => return None,
            }
        }
    }

    /// The next data of a stream, or None at its end. Data of other streams is dropped.
    pub async fn data_of(&mut self, stream: u32) -> Option<Bytes> {
        loop {
            match self.next().await? {
                Frame::Data { id, bytes, .. } if id == stream && !bytes.is_empty() => {
                    return Some(bytes);
                }
                Frame::Data { id, end: true, .. } | Frame::Reset { id } if id == stream => {
                    return None;
                }
                _ => {}
            }
        }
    }

    /// Reads until the server closes the connection.
    pub async fn rest(&mut self) -> Received {
        let mut received = Received::default();
        while let Some(frame) = self.next().await {
            received.add(frame);
        }
        received
    }

    /// Sends input in a task while reading everything.
    pub async fn rest_while_sending(self, id: u32, input: Vec<u8>) -> Received {
        let Spdy { socket, decoder, bytes, deflater, next_id } = self;
        let (read_half, mut write_half) = tokio::io::split(socket);
        let sending = tokio::spawn(async move {
            for chunk in input.chunks(32 << 10) {
                if write_half.write_all(&data_frame(id, chunk, false)).await.is_err() {
                    return;
                }
            }
            let _ = write_half.write_all(&data_frame(id, &[], true)).await;
            // Keeps the connection open until the reader is done.
            std::future::pending::<()>().await;
        });
        let socket: ByteStream = Box::pin(tokio::io::join(read_half, tokio::io::sink()));
        let received = Spdy { socket, decoder, bytes, deflater, next_id }.rest().await;
        sending.abort();
        received
    }
}

/// The two streams of a forwarded connection.
#[derive(Debug)]
pub struct Pair {
    pub error: u32,
    pub data: u32,
}

impl Spdy {
    /// Opens the streams of a forwarded connection.
    pub async fn open_pair(&mut self, port: u16, request: u32) -> Pair {
        let (port, request) = (port.to_string(), request.to_string());
        let headers =
            |kind| [("streamtype", kind), ("port", port.as_str()), ("requestid", request.as_str())];
        let error = self.open(&headers("error")).await;
        self.send(error, b"", true).await;
        let data = self.open(&headers("data")).await;
        Pair { error, data }
    }

    /// Reads until both streams of every pair have ended.
    pub async fn until_ended(&mut self, pairs: &[Pair]) -> Received {
        let mut received = Received::default();
        while !pairs
            .iter()
            .all(|p| received.ended.contains(&p.data) && received.ended.contains(&p.error))
        {
            received.add(self.next().await.expect("the connection stays"));
        }
        received
    }
}

pub(crate) fn data_frame(id: u32, data: &[u8], end: bool) -> BytesMut {
    let mut frame = BytesMut::new();
    frame.put_u32(id);
    frame.put_u32(if end { u32::from(FLAG_FIN) << 24 } else { 0 } | data.len() as u32);
    frame.put_slice(data);
    frame
}

#[derive(Debug, Default)]
pub struct Received {
    data: HashMap<u32, Vec<u8>>,
    pub(crate) ended: Vec<u32>,
    pub(crate) reset: Vec<u32>,
}

impl Received {
    pub(crate) fn add(&mut self, frame: Frame) {
        match frame {
            Frame::Data { id, bytes, end } => {
                self.data.entry(id).or_default().extend_from_slice(&bytes);
                if end {
                    self.ended.push(id);
                }
            }
            Frame::Reset { id } => self.reset.push(id),
            _ => {}
        }
    }

    pub fn of(&self, id: u32) -> &[u8] {
        self.data.get(&id).map_or(&[], Vec::as_slice)
    }

    pub fn text(&self, id: u32) -> &str {
        std::str::from_utf8(self.of(id)).unwrap()
    }

    pub fn status(&self, id: u32) -> serde_json::Value {
        serde_json::from_slice(self.of(id)).unwrap()
    }
}

pub struct Websocket(pub(crate) WebSocketStream<ByteStream>);

impl Websocket {
    pub async fn connect(url: &str, protocol: &str) -> Websocket {
        let mut request = url.replacen("http", "ws", 1).into_client_request().unwrap();
        if !protocol.is_empty() {
            request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
        }
        let socket = connect(url).await;
        let (stream, answer) =
            within(tokio_tungstenite::client_async(request, socket)).await.unwrap();
        let chosen = answer.headers().get("sec-websocket-protocol");
        assert_eq!(chosen.map_or("", |p| p.to_str().unwrap()), protocol);
        Websocket(stream)
    }

    pub async fn send(&mut self, channel: u8, data: &[u8]) {
        let message = [&[channel], data].concat();
        self.0.send(Message::binary(message)).await.unwrap();
    }

    /// Sends input in a task while reading everything, then closes it (version 5 only).
    pub async fn rest_while_sending(self, input: Vec<u8>) -> Received {
        let (mut sink, stream) = self.0.split();
        let sending = tokio::spawn(async move {
            // The size of a message is not limited.
            let (head, tail) = input.split_at(input.len() / 2);
            for chunk in std::iter::once(head).chain(tail.chunks(32 << 10)) {
                sink.send(Message::binary([&[0], chunk].concat())).await.unwrap();
            }
            sink.send(Message::binary(&[255, 0][..])).await.unwrap();
            sink
        });
        let received = rest(stream).await;
        drop(sending.await.unwrap());
        received
    }

    pub async fn next(&mut self) -> Option<Message> {
        within(self.0.next()).await?.ok()
    }

    /// Reads until the server sends a close frame.
    pub async fn rest(&mut self) -> Received {
        rest(&mut self.0).await
    }
}

async fn rest(mut stream: impl Stream<Item = tungstenite::Result<Message>> + Unpin) -> Received {
    use base64::Engine;
    let mut received = Received::default();
    loop {
        let message = within(stream.next()).await.expect("a goodbye").expect("a goodbye");
        let (channel, bytes) = match message {
            Message::Binary(mut bytes) => (bytes.split_to(1)[0], bytes),
            Message::Text(text) => {
                let (digit, text) = text.split_at(1);
                let bytes = base64::engine::general_purpose::STANDARD.decode(text).unwrap();
                (digit.parse().unwrap(), bytes.into())
            }
            Message::Close(frame) => {
                assert_eq!(u16::from(frame.unwrap().code), 1000);
                return received;
            }
            _ => continue,
        };
        received.add(Frame::Data { id: channel.into(), bytes, end: false });
    }
}
