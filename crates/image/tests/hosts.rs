//! Registries configured by `hosts.toml`: mirrors, certificates, headers, and errors that name the
//! hosts that were tried.

mod support;

use std::path::Path;
use std::sync::Arc;

use image::{Auth, Config, Error, ErrorKind, Images};
use support::{Registry, Response, config, explain, hosts, layer, noise, open};

/// A store whose registries are configured in `certs`.
async fn with_hosts(root: &Path, certs: &Path, registry: &str, toml: &str) -> Images {
    let config_path = hosts(certs, registry, toml);
    Images::open(Config { config_path, ..config(root) }).await.unwrap()
}

#[tokio::test]
async fn an_error_names_every_host_that_was_tried() {
    let broken = Registry::scripted(|_, _| Response::status(500));
    let empty = Registry::new();
    let (dir, certs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let places = ["http://127.0.0.1:1".to_owned(), format!("http://{}", broken.authority())];
    let toml = format!(
        "server = \"http://{}\"\n[host.{:?}]\n[host.{:?}]\n",
        empty.authority(),
        places[0],
        places[1]
    );
    let images = with_hosts(dir.path(), certs.path(), "example.com", &toml).await;
    let error = images.pull("example.com/test/image:v1", None, None).await.unwrap_err();
    let text = error.to_string();
    let at = |part: &str| text.find(part).unwrap_or_else(|| panic!("{part}: {text}"));
    assert!(at(&places[0]) < at(&places[1]) && at(&places[1]) < at(&empty.authority()), "{text}");
    assert!(text.contains("example.com/test/image:v1") && text.contains("500"), "{text}");
    // The registry's own error determines the kind.
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(empty.count("/manifests/"), 1);
}

#[tokio::test]
async fn mirrors_get_the_registrys_name_and_their_headers() {
    let mirror = Registry::new();
    let id = mirror.image(&[layer("a", b"x")]);
    let (dir, certs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let toml = format!(
        "[host.\"http://{0}\"]\n[host.\"http://{0}\".header]\nx-team = [\"one\"]\n",
        mirror.authority()
    );
    let images = with_hosts(dir.path(), certs.path(), "_default", &toml).await;
    let pulled = images.pull("quay.example:8443/test/image:v1", None, None).await.unwrap();
    assert_eq!(pulled.to_string(), id);
    let requests = mirror.requests();
    assert!(requests.len() >= 3);
    for request in requests {
        assert!(request.path.ends_with("?ns=quay.example%3A8443"), "{}", request.path);
        assert_eq!(request.headers["x-team"], "one");
    }
}

#[tokio::test]
async fn a_mirror_is_used_only_for_its_capabilities() {
    let layers = [layer("a", b"x"), layer("b", &noise(5000))];
    let (tags, blobs, upstream) = (Registry::new(), Registry::new(), Registry::new());
    for registry in [&tags, &blobs, &upstream] {
        registry.image(&layers);
    }
    let (dir, certs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let toml = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"resolve\"]\n\
         [host.\"http://{}\"]\ncapabilities = [\"pull\"]\n",
        upstream.authority(),
        tags.authority(),
        blobs.authority()
    );
    let images = with_hosts(dir.path(), certs.path(), "reg.example", &toml).await;
    images.pull("reg.example/test/image:v1", None, None).await.unwrap();
    assert_eq!((tags.count("/manifests/"), tags.count("/blobs/")), (1, 0));
    assert_eq!((blobs.count("/manifests/"), blobs.count("/blobs/")), (0, 3));
    assert_eq!(upstream.requests().len(), 0);

    let toml = "capabilities = [\"push\"]\nserver = \"http://127.0.0.1:1\"";
    hosts(certs.path(), "none.example", toml);
    let error = images.pull("none.example/test/image:v1", None, None).await.unwrap_err();
    assert!(error.to_string().contains("no host with the capability"), "{error}");
}

#[tokio::test]
async fn override_path_replaces_the_v2_prefix() {
    let registry = Registry::scripted(|request, response| {
        assert!(request.path.starts_with("/odd/test/image/"), "{}", request.path);
        response
    });
    registry.image(&[layer("a", b"x")]);
    registry.move_files("/v2/", "/odd/");
    let (dir, certs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let toml = format!("server = \"http://{}/odd/\"\noverride_path = true", registry.authority());
    let images = with_hosts(dir.path(), certs.path(), "reg.example", &toml).await;
    images.pull("reg.example/test/image:v1", None, None).await.unwrap();
}

#[tokio::test]
async fn a_corrected_file_applies_to_the_next_pull() {
    let registry = Registry::new();
    registry.image(&[layer("a", b"x")]);
    let (dir, certs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let images = with_hosts(dir.path(), certs.path(), "reg.example", "\nserver = yes\n").await;
    let name = "reg.example/test/image:v1";
    let error = images.pull(name, None, None).await.unwrap_err();
    let file = certs.path().join("reg.example/hosts.toml");
    assert!(error.to_string().contains(&format!("{}:2: ", file.display())), "{error}");
    assert!(matches!(error.inner(), Error::RegistryConfig { .. }));
    hosts(certs.path(), "reg.example", &format!("server = \"http://{}\"", registry.authority()));
    images.pull(name, None, None).await.unwrap();
}

#[tokio::test]
async fn an_unresponsive_mirror_delays_a_pull_only_once() {
    let upstream = Registry::new();
    upstream.image(&[layer("a", b"x"), layer("b", b"y"), layer("c", b"z")]);
    // Accepts connections and sends nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (dir, certs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let toml = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\n",
        upstream.authority(),
        silent.local_addr().unwrap()
    );
    let config_path = hosts(certs.path(), "reg.example", &toml);
    let settings = Config { config_path, attempts: 1, ..config(dir.path()) };
    let images = Images::open(settings).await.unwrap();
    let start = std::time::Instant::now();
    images.pull("reg.example/test/image:v1", None, None).await.unwrap();
    // One request with a timeout of one second, and none for the blobs.
    assert!(start.elapsed().as_secs() < 4, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_mirror_gets_credentials_that_name_no_server() {
    let challenge = |request: &support::Request, response: Response| match request
        .headers
        .contains_key("authorization")
    {
        true => response,
        false => Response::status(401).header("WWW-Authenticate", "Basic realm=x"),
    };
    let mirror = Registry::scripted(challenge);
    mirror.image(&[layer("a", b"x")]);
    let (dir, certs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let toml = format!("server = \"http://{}\"", mirror.authority());
    let images = with_hosts(dir.path(), certs.path(), "reg.example", &toml).await;
    let auth = |server_address: &str| {
        let (username, password) = ("u".into(), "p".into());
        Some(Auth { username, password, server_address: server_address.into(), ..Auth::default() })
    };
    let name = "reg.example/test/image:v1";
    let error = images.pull(name, auth("https://reg.example"), None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    assert!(mirror.requests().iter().all(|r| !r.headers.contains_key("authorization")));
    images.pull(name, auth(""), None).await.unwrap();
    let garbled = Some(Auth { auth: "!".into(), ..Auth::default() });
    let error = images.pull(name, garbled, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[tokio::test]
async fn a_client_certificate_is_sent_on_request() {
    let registry = Registry::new();
    let id = registry.image(&[layer("a", &noise(200_000))]);
    let server = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (client, other) = (self_signed("node"), self_signed("other"));
    let port = mutual_tls_proxy(&server, &client, registry.port).await;
    let authority = format!("localhost:{port}");
    let name = format!("{authority}/test/image:v1");
    let certs = tempfile::tempdir().unwrap();
    let directory = certs.path().join(format!("localhost_{port}_"));
    std::fs::create_dir(&directory).unwrap();
    let put = |file: &str, text: String| std::fs::write(directory.join(file), text).unwrap();
    put("ca.crt", server.cert.pem());
    let pull = async || {
        let root = tempfile::tempdir().unwrap();
        let config_path = certs.path().to_str().unwrap().to_owned();
        let images = Images::open(Config { config_path, ..config(root.path()) }).await.unwrap();
        images.pull(&name, None, None).await.map(|id| id.to_string())
    };
    let error = pull().await.unwrap_err();
    assert!(explain(&error).to_lowercase().contains("certificate"), "{}", explain(&error));

    // Docker layout: the certificate that the server trusts is chosen.
    put("a.cert", other.cert.pem());
    put("a.key", other.signing_key.serialize_pem());
    put("b.cert", client.cert.pem());
    put("b.key", client.signing_key.serialize_pem());
    assert_eq!(pull().await.unwrap(), id);

    // In hosts.toml: a pair, and certificate and key in one file.
    for (name, text) in [
        ("pair", "client = [[\"b.cert\", \"b.key\"]]"),
        ("one", "client = \"both.pem\""),
        ("list", "client = [\"both.pem\"]"),
    ] {
        put("both.pem", client.cert.pem() + &client.signing_key.serialize_pem());
        put("hosts.toml", format!("ca = [\"ca.crt\"]\n{text}\n"));
        assert_eq!(pull().await.unwrap(), id, "{name}");
    }
    put("both.pem", client.cert.pem());
    let error = pull().await.unwrap_err().to_string();
    assert!(error.contains("both.pem") && error.contains("private key"), "{error}");
}

fn self_signed(name: &str) -> rcgen::CertifiedKey<rcgen::KeyPair> {
    let mut parameters = rcgen::CertificateParams::new([name.to_owned()]).unwrap();
    parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
    let signing_key = rcgen::KeyPair::generate().unwrap();
    rcgen::CertifiedKey { cert: parameters.self_signed(&signing_key).unwrap(), signing_key }
}

/// TLS that requests a client certificate, in front of a plain registry.
async fn mutual_tls_proxy(
    server: &rcgen::CertifiedKey<rcgen::KeyPair>,
    client: &rcgen::CertifiedKey<rcgen::KeyPair>,
    target: u16,
) -> u16 {
    use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
    use tokio_rustls::rustls::server::WebPkiClientVerifier;
    use tokio_rustls::rustls::{RootCertStore, ServerConfig, crypto::ring};
    let provider = Arc::new(ring::default_provider());
    let mut trusted = RootCertStore::empty();
    trusted.add(client.cert.der().clone()).unwrap();
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(trusted), Arc::clone(&provider))
            .build()
            .unwrap();
    let key = PrivatePkcs8KeyDer::from(server.signing_key.serialize_der());
    let tls = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![server.cert.der().clone()], PrivateKeyDer::Pkcs8(key))
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
    support::proxy(acceptor, target).await
}

#[tokio::test]
async fn redirect_loops_fail() {
    let registry = Registry::scripted(|request, response| {
        if !request.path.contains("/blobs/") {
            return response;
        }
        let next = match request.path.split_once("?n=") {
            Some((path, n)) => format!("{path}?n={}", n.parse::<u32>().unwrap() + 1),
            None => format!("{}?n=1", request.path),
        };
        Response::status(307).header("Location", next)
    });
    registry.image(&[layer("a", b"x")]);
    let dir = tempfile::tempdir().unwrap();
    let images = open(dir.path()).await;
    let error = images.pull(&registry.name(), None, None).await.unwrap_err();
    assert!(explain(&error).contains("redirect"), "{}", explain(&error));
    assert!(registry.count("/blobs/") <= 8, "{}", registry.count("/blobs/"));
}

#[tokio::test]
async fn headers_of_a_host_are_not_sent_to_other_servers() {
    let realm = Registry::scripted(|_, _| Response::ok(r#"{"token":"t"}"#));
    let storage = Registry::new();
    let (service, target) = (realm.authority(), storage.authority());
    let registry = Registry::scripted(move |request, response| {
        if !request.headers.contains_key("authorization") {
            let challenge = format!("Bearer realm=\"http://{service}/token\",service=\"reg\"");
            return Response::status(401).header("WWW-Authenticate", challenge);
        }
        // First a redirect within the server, then one to another.
        match (request.path.contains("/blobs/"), request.path.contains("?within")) {
            (false, _) => response,
            (true, false) => {
                Response::status(302).header("Location", format!("{}?within", request.path))
            }
            (true, true) => Response::status(307).header(
                "Location",
                format!("http://{target}{}", request.path.replace("?within", "")),
            ),
        }
    });
    for registry in [&registry, &storage] {
        registry.image(&[layer("a", b"x")]);
    }
    let (dir, certs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let toml = format!(
        "server = \"http://{0}\"\n[host.\"http://{0}\"]\n[host.\"http://{0}\".header]\n\
         x-secret = [\"for the registry\"]\n",
        registry.authority()
    );
    let images = with_hosts(dir.path(), certs.path(), "reg.example", &toml).await;
    images.pull("reg.example/test/image:v1", None, None).await.unwrap();
    assert!(registry.count("?within") >= 2);
    for request in registry.requests() {
        assert_eq!(request.headers["x-secret"], "for the registry", "{}", request.path);
    }
    assert_eq!(realm.count("/token"), 1);
    assert!(storage.count("/blobs/") >= 2);
    for request in realm.requests().iter().chain(&storage.requests()) {
        for name in ["x-secret", "authorization"] {
            assert!(!request.headers.contains_key(name), "{name} at {}", request.path);
        }
    }
}

#[tokio::test]
async fn a_password_in_a_body_is_not_sent_to_a_redirects_other_server() {
    let thief = Registry::scripted(|_, _| Response::ok(r#"{"token":"t"}"#));
    let target = thief.authority();
    let port = Arc::new(std::sync::Mutex::new(0));
    let known = port.clone();
    let registry = Registry::scripted(move |request, response| {
        if request.path.starts_with("/token") {
            let location = format!("http://{target}/token");
            return match request.method.as_str() {
                "POST" => Response::status(307).header("Location", location),
                _ => Response::status(404),
            };
        }
        if request.headers.contains_key("authorization") {
            return response;
        }
        let realm = format!("http://127.0.0.1:{}/token", *known.lock().unwrap());
        Response::status(401).header("WWW-Authenticate", format!("Bearer realm=\"{realm}\""))
    });
    *port.lock().unwrap() = registry.port;
    registry.image(&[layer("a", b"x")]);
    let dir = tempfile::tempdir().unwrap();
    let auth = Auth { identity_token: "refresh".into(), ..Auth::default() };
    let pulled = open(dir.path()).await.pull(&registry.name(), Some(auth), None).await;
    let error = pulled.unwrap_err();
    assert!(explain(&error).contains("to another server"), "{}", explain(&error));
    assert_eq!(thief.requests().len(), 0);
}
