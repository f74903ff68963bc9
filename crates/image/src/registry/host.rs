//! How to reach a registry: the endpoints for a name, and an HTTP client for each.

use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use reqwest::Url;
use reqwest::redirect::Policy;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::config::{Config, Registry};
use crate::error::Error;

const MAX_REDIRECTS: usize = 5;

/// The URLs under which a registry's `/v2/` may be found, in the order of trying.
pub fn endpoints(config: &Config, registry: &str) -> Result<Vec<Url>, Error> {
    let bad = |reason: String| Error::RegistryConfig { registry: registry.into(), reason };
    let settings = config.registries.get(registry);
    let mut urls = Vec::new();
    for mirror in settings.map_or(&[][..], |settings| &settings.endpoints) {
        let url: Url = mirror.parse().map_err(|e| bad(format!("endpoint {mirror:?}: {e}")))?;
        let host = authority(&url);
        let plain = config.registries.get(&host).is_some_and(|settings| settings.plain_http);
        match url.scheme() {
            "https" => {}
            "http" if plain || is_loopback(&host) => {}
            "http" => {
                return Err(bad(format!(
                    "endpoint {mirror:?} is plain http; set plain_http for {host:?} to allow it"
                )));
            }
            _ => return Err(bad(format!("endpoint {mirror:?} is neither http nor https"))),
        }
        urls.push(url);
    }
    let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
    let schemes: &[&str] = match settings {
        Some(settings) if settings.plain_http => &["http"],
        Some(settings) if settings.ca.is_some() || settings.skip_verify => &["https"],
        // Test registries on this machine seldom have certificates.
        _ if is_loopback(registry) => &["http", "https"],
        _ => &["https"],
    };
    for scheme in schemes {
        let url = format!("{scheme}://{host}");
        urls.push(url.parse().map_err(|e| bad(format!("{url}: {e}")))?);
    }
    Ok(urls)
}

/// Host and port as they stand in references.
pub fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

pub fn is_loopback(authority: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.parse::<u16>().is_ok() => host,
        _ => authority,
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// A client with the settings of one registry.
pub fn client(config: &Config, registry: &str) -> Result<reqwest::Client, Error> {
    let bad = |reason: String| Error::RegistryConfig { registry: registry.into(), reason };
    let default = Registry::default();
    let settings = config.registries.get(registry).unwrap_or(&default);
    let tls = tls_config(settings).map_err(bad)?;
    let mut builder = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .user_agent(concat!("nacelle/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_secs(config.connect_timeout_seconds))
        .redirect(Policy::custom(|attempt| {
            let from_tls = attempt.previous().iter().any(|url| url.scheme() == "https");
            if attempt.previous().len() > MAX_REDIRECTS {
                attempt.error("too many redirects")
            } else if from_tls && attempt.url().scheme() != "https" {
                attempt.error("redirected from https to plain http")
            } else {
                attempt.follow()
            }
        }));
    if is_loopback(registry) {
        // A proxy's own loopback is another machine's.
        builder = builder.no_proxy();
    }
    builder.build().map_err(|e| bad(e.to_string()))
}

fn tls_config(settings: &Registry) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?;
    if settings.skip_verify {
        let verifier = Arc::new(AcceptAny(provider));
        return Ok(builder
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth());
    }
    let mut roots = RootCertStore::empty();
    roots.roots.clone_from(&system_roots().roots);
    if let Some(path) = &settings.ca {
        let bad = |e: &dyn std::fmt::Display| format!("CA file {}: {e}", path.display());
        let mut found = false;
        for certificate in CertificateDer::pem_file_iter(path).map_err(|e| bad(&e))? {
            roots.add(certificate.map_err(|e| bad(&e))?).map_err(|e| bad(&e))?;
            found = true;
        }
        if !found {
            return Err(bad(&"it has no certificate"));
        }
    }
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// The machine's certificate authorities, parsed once. Without any it can still use plain http and
/// authorities of its own.
fn system_roots() -> &'static RootCertStore {
    static ROOTS: OnceLock<RootCertStore> = OnceLock::new();
    ROOTS.get_or_init(|| {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        roots
    })
}

/// For registries whose administrator asked for no verification.
#[derive(Debug)]
struct AcceptAny(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAny {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_recognised_in_every_form() {
        for host in ["localhost", "localhost:5000", "127.0.0.1", "127.8.9.1:1", "[::1]:5000"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.evil.com", "128.0.0.1", "registry:5000", "[::2]:1"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn mirrors_come_first_and_plain_http_needs_leave() {
        let mut config = Config::default();
        let mirror = |url: &str| Registry { endpoints: vec![url.into()], ..Registry::default() };
        config.registries.insert("docker.io".into(), mirror("https://mirror.local"));
        let urls: Vec<_> =
            endpoints(&config, "docker.io").unwrap().iter().map(Url::to_string).collect();
        assert_eq!(urls, ["https://mirror.local/", "https://registry-1.docker.io/"]);
        config.registries.insert("docker.io".into(), mirror("http://mirror.local"));
        assert!(endpoints(&config, "docker.io").unwrap_err().to_string().contains("plain_http"));
        let plain = Registry { plain_http: true, ..Registry::default() };
        config.registries.insert("mirror.local".into(), plain);
        assert!(endpoints(&config, "docker.io").is_ok());
    }
}
