//! URLs, tokens, methods, negotiation, TLS.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::host::Host;
use super::{attach, exec, port_forward, server, server_with, within};
use crate::client::{Spdy, address, connect, fetch, spdy_upgrade};
use crate::{
    AttachParams, ByteStream, Config, Error, ExecParams, Limits, PortForwardParams, Server, Tls,
};

const WEBSOCKET: [(&str, &str); 4] = [
    ("Connection", "keep-alive, Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

#[tokio::test]
async fn a_url_is_valid_once_for_its_own_verb_and_for_a_limited_time() {
    let server = server_with(Config { url_ttl: Duration::from_millis(300), ..Config::default() });
    let upgrade = spdy_upgrade("v4.channel.k8s.io");
    let url = exec(&server, "o", "true");
    assert!(url.starts_with(&format!("{}/exec/", server.base_url())));
    assert!(attach(&server, "o", "true").contains("/attach/"));
    assert!(port_forward(&server, &[]).contains("/portforward/"));
    for other in [url.replace("/exec/", "/attach/"), format!("{url}x"), format!("{url}/x")] {
        let (head, body) = fetch(&other, "POST", &upgrade).await;
        assert_eq!(head.status, 404);
        assert!(body.contains("unknown, expired, or already used"), "{body}");
    }
    let (head, _) = fetch(&url, "POST", &upgrade).await;
    assert_eq!(head.status, 101);
    assert_eq!(head.headers("connection"), ["Upgrade"]);
    assert_eq!(fetch(&url, "POST", &upgrade).await.0.status, 404);

    let timed_out = exec(&server, "o", "true");
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(fetch(&timed_out, "POST", &upgrade).await.0.status, 404);
}

#[tokio::test]
async fn refusals_have_a_reason_and_do_not_consume_the_url() {
    let server = server();
    let url = exec(&server, "o", "true");
    let forward = port_forward(&server, &[]);
    let no_version = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")];
    let other_upgrade = [("Connection", "Upgrade"), ("Upgrade", "h2c")];
    let not_asked = [("Upgrade", "SPDY/3.1"), ("X-Stream-Protocol-Version", "v4.channel.k8s.io")];
    let future = spdy_upgrade("v9.channel.k8s.io");
    let alien = spdy_upgrade("portforward.k8s.io");
    let with = |name, value| [&WEBSOCKET[..], &[(name, value)]].concat();
    let alien_websocket = with("Sec-WebSocket-Protocol", "chat, v9.channel.k8s.io");
    let old_websocket = [&WEBSOCKET[..2], &[("Sec-WebSocket-Version", "8")]].concat();
    let tunnelled_exec = with("Sec-WebSocket-Protocol", "SPDY/3.1+portforward.k8s.io");
    let portless = with("Sec-WebSocket-Protocol", "v4.channel.k8s.io");
    type Lines<'a> = &'a [(&'a str, &'a str)];
    let table: [(&str, &str, Lines, u16, &str); 13] = [
        (&url, "POST", &[], 400, "supports upgrades to SPDY/3.1 or WebSocket"),
        (&url, "GET", &other_upgrade, 400, "supports upgrades"),
        (&url, "GET", &not_asked, 400, "supports upgrades"),
        (&url, "POST", &no_version, 400, "x-stream-protocol-version is missing"),
        (&url, "POST", &future, 403, "none of the client's protocols"),
        (&url, "POST", &alien, 403, "none of the client's protocols"),
        (&url, "PUT", &[], 405, "only GET and POST"),
        (&url, "DELETE", &future, 405, "only GET and POST"),
        (&url, "GET", &alien_websocket, 403, "none of the client's WebSocket protocols"),
        (&url, "GET", &tunnelled_exec, 403, "none of the client's WebSocket protocols"),
        (&url, "GET", &old_websocket, 426, "version 13"),
        (&url, "GET", &WEBSOCKET[..3], 400, "Sec-WebSocket-Key is missing"),
        (&forward, "GET", &portless, 400, "1 to 127 ports, not 0"),
    ];
    for (url, method, headers, status, message) in table {
        let (head, body) = fetch(url, method, headers).await;
        assert_eq!(head.status, status, "{method} {headers:?}: {body}");
        assert!(body.contains(message), "{method} {headers:?}: {body}");
    }
    let (head, _) = fetch(&url, "POST", &future).await;
    assert_eq!(head.headers("x-accepted-stream-protocol-versions").len(), 5);
    for unknown in ["/", "/exec", "/logs/x", "/exec%2fx"] {
        let (head, _) = fetch(&format!("{}{unknown}", server.base_url()), "GET", &[]).await;
        assert_eq!(head.status, 404, "{unknown}");
    }

    // The client's order decides; versions may be listed or repeated.
    let listed = [
        ("Connection", "Upgrade"),
        ("Upgrade", "SPDY/3.1"),
        ("X-Stream-Protocol-Version", "v9.channel.k8s.io, v3.channel.k8s.io"),
        ("X-Stream-Protocol-Version", "v4.channel.k8s.io"),
    ];
    let (head, _) = fetch(&url, "GET", &listed).await;
    assert_eq!(head.status, 101);
    assert_eq!(head.headers("x-stream-protocol-version"), ["v3.channel.k8s.io"]);
}

#[tokio::test]
async fn oversized_and_malformed_requests_get_a_response_and_are_closed() {
    let server = server();
    let url = exec(&server, "o", "true");
    let large = "x".repeat(20 << 10);
    let (head, _) = fetch(&url, "GET", &[("X-Large", &large)]).await;
    assert_eq!(head.status, 431);
    let (head, _) = fetch(&format!("{url}?{large}"), "GET", &[]).await;
    assert!(matches!(head.status, 414 | 431), "{head:?}");
    let mut socket = connect(&url).await;
    socket.write_all(b"\x16\x03\x01 this is no HTTP\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = within(tokio::io::AsyncReadExt::read_to_end(&mut socket, &mut answer)).await;
    assert!(answer.starts_with(b"HTTP/1.1 400"), "{answer:?}");
    assert_eq!(fetch(&url, "POST", &spdy_upgrade("channel.k8s.io")).await.0.status, 101);
}

#[tokio::test]
async fn a_connection_without_a_request_is_closed() {
    let limits = Limits { http_header_time: Duration::from_millis(200), ..Limits::default() };
    let server = server_with(Config { limits, ..Config::default() });
    for sent in [&b""[..], b"GET / HTTP/1.1\r\nHost"] {
        let mut socket = TcpStream::connect(server.address()).await.unwrap();
        socket.write_all(sent).await.unwrap();
        let mut answer = Vec::new();
        let _ = within(tokio::io::AsyncReadExt::read_to_end(&mut socket, &mut answer)).await;
    }
}

#[tokio::test]
async fn unused_urls_are_limited_and_invalid_parameters_are_refused() {
    let limits = Limits { pending_urls: 3, ..Limits::default() };
    let server = server_with(Config { limits, ..Config::default() });
    for _ in 0..3 {
        exec(&server, "o", "true");
    }
    let forward = PortForwardParams { pod: "p".into(), ports: vec![] };
    let refused = server.port_forward_url(forward.clone());
    assert!(matches!(refused, Err(Error::TooManyPending { limit: 3 })));

    let good = ExecParams {
        container: "c".into(),
        command: vec!["true".into()],
        tty: false,
        stdin: false,
        stdout: true,
        stderr: false,
    };
    let attach =
        AttachParams { container: "c".into(), tty: true, stdin: true, stdout: true, stderr: true };
    for bad in [
        ExecParams { container: String::new(), ..good.clone() },
        ExecParams { command: vec![], ..good.clone() },
        ExecParams { tty: true, stderr: true, ..good.clone() },
        ExecParams { stdout: false, ..good.clone() },
    ] {
        assert!(matches!(server.exec_url(bad), Err(Error::Invalid(_))));
    }
    assert!(matches!(server.attach_url(attach), Err(Error::Invalid(_))));
    for bad in [
        PortForwardParams { pod: String::new(), ..forward.clone() },
        PortForwardParams { ports: vec![80, 0], ..forward },
    ] {
        assert!(matches!(server.port_forward_url(bad), Err(Error::Invalid(_))));
    }
}

#[tokio::test]
async fn with_a_certificate_all_connections_use_tls() {
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let tls = Tls { certificate: dir.path().join("cert.pem"), key: dir.path().join("key.pem") };
    std::fs::write(&tls.certificate, certified.cert.pem()).unwrap();
    std::fs::write(&tls.key, certified.signing_key.serialize_pem()).unwrap();
    let server = server_with(Config { tls: Some(tls.clone()), ..Config::default() });
    assert!(server.base_url().starts_with("https://127.0.0.1:"));

    let mut roots = rustls::RootCertStore::empty();
    roots.add(certified.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
    let secure = async |url: &str| {
        let socket = TcpStream::connect(address(url)).await.unwrap();
        let name = "localhost".try_into().unwrap();
        let stream: ByteStream = Box::pin(connector.connect(name, socket).await.unwrap());
        stream
    };
    let url = exec(&server, "io", "cat; exit 6");
    let mut client = Spdy::over(secure(&url).await, &url, "v4.channel.k8s.io").await;
    let ids = client.open_all(&["error", "stdin", "stdout"]).await;
    let input = super::noise(3 << 20);
    let received = client.rest_while_sending(ids["stdin"], input.clone()).await;
    assert!(received.of(ids["stdout"]) == input);
    assert_eq!(received.status(ids["error"])["details"]["causes"][0]["message"], "6");

    // A client that disconnects without closing TLS.
    let url = exec(&server, "o", "echo $$; exec sleep 1000");
    let mut client = Spdy::over(secure(&url).await, &url, "v4.channel.k8s.io").await;
    let ids = client.open_all(&["error", "stdout"]).await;
    let line = client.data_of(ids["stdout"]).await.unwrap();
    drop(client);
    super::wait_for_exit(std::str::from_utf8(&line).unwrap().trim().parse().unwrap()).await;

    // Plain HTTP is refused.
    let mut plain: ByteStream = Box::pin(TcpStream::connect(server.address()).await.unwrap());
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = within(tokio::io::AsyncReadExt::read_to_end(&mut plain, &mut answer)).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");

    let missing = Tls { key: dir.path().join("none.pem"), ..tls.clone() };
    let config = Config { tls: Some(missing), ..Config::default() };
    assert!(matches!(Server::bind(config, Arc::new(Host)), Err(Error::Pem { .. })));
    let swapped = Tls { certificate: tls.key, key: tls.certificate };
    let config = Config { tls: Some(swapped), ..Config::default() };
    assert!(Server::bind(config, Arc::new(Host)).is_err());
}

#[tokio::test]
async fn an_address_in_use_is_an_error_with_the_address() {
    let server = server();
    let config = Config { address: server.address(), ..Config::default() };
    let Err(error) = Server::bind(config, Arc::new(Host)) else { panic!("bound twice") };
    assert!(error.to_string().contains(&server.address().to_string()), "{error}");
}

#[tokio::test]
async fn a_dropped_server_ends_its_sessions() {
    let server = server();
    let url = exec(&server, "o", "echo $$; exec sleep 1000");
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    let ids = client.open_all(&["error", "stdout"]).await;
    let line = client.data_of(ids["stdout"]).await.unwrap();
    drop(server);
    super::wait_for_exit(std::str::from_utf8(&line).unwrap().trim().parse().unwrap()).await;
    assert_eq!(client.next().await, None);
    TcpStream::connect(address(&url)).await.unwrap_err();
}
