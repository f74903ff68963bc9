//! A scripted registry that can send wrong responses: one thread per connection, hand-written
//! HTTP/1.1 so that every byte can be chosen.

// Each test program uses only a part.
#![allow(dead_code)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use image::{Config, Digest, Images};

/// One request as received; header names in lower case.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    /// Path with query.
    pub path: String,
    pub headers: HashMap<String, String>,
    pub body: String,
}

/// The response to send.
#[derive(Debug, Clone, Default)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Close after this many bytes of the body, whatever its Content-Length.
    pub cut: Option<usize>,
    /// Stop sending after this many bytes of the body without closing.
    pub stall: Option<usize>,
    /// Content-Length to send instead of the true one.
    pub length: Option<u64>,
}

impl Response {
    pub fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self { status: 200, body: body.into(), ..Self::default() }
    }

    pub fn status(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }
}

type Script = dyn Fn(&Request, Response) -> Response + Send + Sync;

/// The fake registry; stops when dropped.
pub struct Registry {
    pub port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    files: Mutex<HashMap<String, Response>>,
    requests: Mutex<Vec<Request>>,
    script: Box<Script>,
    stop: AtomicBool,
}

impl Registry {
    pub fn new() -> Self {
        Self::scripted(|_, response| response)
    }

    /// `script` gets each request with the correct response and returns the one to send.
    pub fn scripted(
        script: impl Fn(&Request, Response) -> Response + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            files: Mutex::default(),
            requests: Mutex::default(),
            script: Box::new(script),
            stop: AtomicBool::new(false),
        });
        let server = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if server.stop.load(Ordering::Relaxed) {
                    break;
                }
                let server = Arc::clone(&server);
                std::thread::spawn(move || server.serve(stream));
            }
        });
        Self { port, shared }
    }

    pub fn authority(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn name(&self) -> String {
        format!("{}/test/image:v1", self.authority())
    }

    pub fn put(&self, path: &str, response: Response) {
        self.shared.files.lock().unwrap().insert(path.into(), response);
    }

    pub fn blob(&self, bytes: &[u8]) -> String {
        let digest = Digest::of(bytes).to_string();
        self.put(&format!("/v2/test/image/blobs/{digest}"), Response::ok(bytes));
        digest
    }

    pub fn manifest(&self, tag: &str, bytes: &[u8], media_type: &str) -> String {
        let digest = Digest::of(bytes).to_string();
        let response = Response::ok(bytes)
            .header("Content-Type", media_type)
            .header("Docker-Content-Digest", digest.clone());
        self.put(&format!("/v2/test/image/manifests/{tag}"), response.clone());
        self.put(&format!("/v2/test/image/manifests/{digest}"), response);
        digest
    }

    /// Serves an image with these tar layers as `test/image:v1`; returns its id.
    pub fn image(&self, layers: &[Vec<u8>]) -> String {
        self.image_as("v1", layers, "")
    }

    pub fn image_as(&self, tag: &str, layers: &[Vec<u8>], env: &str) -> String {
        let diff_ids: Vec<_> = layers.iter().map(|l| format!("\"{}\"", Digest::of(l))).collect();
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","config":{{"Env":["X={env}"]}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
            diff_ids.join(",")
        );
        let id = self.blob(config.as_bytes());
        let descriptors: Vec<_> = layers
            .iter()
            .map(|layer| {
                format!(
                    r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{}","size":{}}}"#,
                    self.blob(layer),
                    layer.len()
                )
            })
            .collect();
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{id}","size":{}}},"layers":[{}]}}"#,
            config.len(),
            descriptors.join(",")
        );
        self.manifest(tag, manifest.as_bytes(), MANIFEST);
        id
    }

    /// Digest of what is served under a tag.
    pub fn digest_of(&self, tag: &str) -> String {
        let files = self.shared.files.lock().unwrap();
        Digest::of(&files[&format!("/v2/test/image/manifests/{tag}")].body).to_string()
    }

    /// Serves an index with one entry plus `more`; returns its digest.
    pub fn put_index(&self, tag: &str, entry: &str, more: &str) -> String {
        let index =
            format!(r#"{{"schemaVersion":2,"manifests":[{{"digest":"{entry}","size":1{more}}}]}}"#);
        self.manifest(tag, index.as_bytes(), "application/vnd.oci.image.index.v1+json")
    }

    /// Serves the paths below `from` below `to` instead.
    pub fn move_files(&self, from: &str, to: &str) {
        let mut files = self.shared.files.lock().unwrap();
        *files = files.drain().map(|(path, file)| (path.replacen(from, to, 1), file)).collect();
    }

    pub fn requests(&self) -> Vec<Request> {
        self.shared.requests.lock().unwrap().clone()
    }

    /// Number of requests whose path contains `part`.
    pub fn count(&self, part: &str) -> usize {
        self.requests().iter().filter(|request| request.path.contains(part)).count()
    }
}

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

impl Drop for Registry {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Shared {
    fn serve(&self, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut stream = stream;
        while let Some(request) = read_request(&mut reader) {
            let path = request.path.split('?').next().unwrap().to_owned();
            let honest = self.files.lock().unwrap().get(&path).cloned();
            let honest = honest.map_or(Response::status(404), |r| ranged(&request, r));
            self.requests.lock().unwrap().push(request.clone());
            let response = (self.script)(&request, honest);
            if !self.send(&mut stream, &response) {
                let _ = stream.shutdown(Shutdown::Both);
                return;
            }
        }
    }

    /// False if the connection must be closed.
    fn send(&self, stream: &mut TcpStream, response: &Response) -> bool {
        let length = response.length.unwrap_or(response.body.len() as u64);
        let mut head = format!("HTTP/1.1 {} x\r\nContent-Length: {length}\r\n", response.status);
        for (name, value) in &response.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let until = response.cut.or(response.stall).unwrap_or(response.body.len());
        let body = &response.body[..until.min(response.body.len())];
        if stream.write_all(head.as_bytes()).is_err() || stream.write_all(body).is_err() {
            return false;
        }
        if response.stall.is_some() {
            while !self.stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        response.cut.is_none() && response.stall.is_none() && length == response.body.len() as u64
    }
}

/// Answers `Range: bytes=N-` correctly.
fn ranged(request: &Request, response: Response) -> Response {
    let start = request
        .headers
        .get("range")
        .and_then(|value| value.strip_prefix("bytes="))
        .and_then(|value| value.strip_suffix('-'))
        .and_then(|value| value.parse::<usize>().ok());
    match start {
        Some(start) if response.status == 200 && start < response.body.len() => {
            let total = response.body.len();
            Response { status: 206, body: response.body[start..].to_vec(), ..response }
                .header("Content-Range", format!("bytes {start}-{}/{total}", total - 1))
        }
        _ => response,
    }
}

fn read_request(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|&n| n > 0)?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|&n| n > 0)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers.get("content-length").and_then(|v| v.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Request { method, path, headers, body: String::from_utf8_lossy(&body).into_owned() })
}

/// TLS in front of a plain server.
pub async fn proxy(acceptor: tokio_rustls::TlsAcceptor, target: u16) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut tls) = acceptor.accept(stream).await else { return };
                let mut plain =
                    tokio::net::TcpStream::connect(("127.0.0.1", target)).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut tls, &mut plain).await;
            });
        }
    });
    port
}

/// A tar with one file.
pub fn layer(path: &str, content: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_cksum();
    builder.append(&header, content).unwrap();
    builder.into_inner().unwrap()
}

/// Incompressible bytes, not zeros.
pub fn noise(length: usize) -> Vec<u8> {
    let mut x = 0x1234_5678u32;
    (0..length)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            (x as u8) | 1
        })
        .collect()
}

pub fn config(root: &Path) -> Config {
    Config {
        root: root.into(),
        config_path: String::new(),
        connect_timeout_seconds: 2,
        stall_timeout_seconds: 1,
        attempts: 3,
        ..Config::default()
    }
}

/// Writes a registry's host configuration; returns the directory for `config_path`.
pub fn hosts(dir: &Path, registry: &str, toml: &str) -> String {
    let directory = dir.join(registry);
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("hosts.toml"), toml).unwrap();
    dir.to_str().unwrap().to_owned()
}

pub async fn open(root: &Path) -> Images {
    Images::open(config(root)).await.unwrap()
}

/// Opens a store whose previous user is being dropped.
pub async fn reopen(config: Config) -> Images {
    let start = std::time::Instant::now();
    loop {
        match Images::open(config.clone()).await {
            Err(image::Error::InUse { .. }) if start.elapsed() < Duration::from_secs(30) => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            opened => return opened.unwrap(),
        }
    }
}

/// An error with all its sources.
pub fn explain(error: &image::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

/// Fails unless the store contains only its empty directories.
pub fn assert_clean(root: &Path) {
    let mut left = Vec::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            let path = entry.path();
            let name = entry.file_name().into_string().unwrap();
            if !["content", "images", "blobs", "sha256", "ingest", "images.lock", "refs.json"]
                .contains(&name.as_str())
            {
                left.push(path.clone());
            }
            if path.is_dir() {
                directories.push(path);
            }
        }
    }
    assert!(left.is_empty(), "left behind: {left:?}");
}
