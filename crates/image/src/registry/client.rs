//! HTTP clients: one per TLS configuration, so that connections are reused.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use reqwest::redirect::Policy;
use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::authority::{authority, is_loopback};
use super::hosts::{Host, Pem, Tls};

/// Maximum number of cached clients: changing host files must not exhaust the memory.
const MAX_CLIENTS: usize = 64;

#[derive(Default)]
pub struct Clients(Mutex<HashMap<Key, reqwest::Client>>);

#[derive(PartialEq, Eq, Hash)]
struct Key {
    tls: Tls,
    connect: Duration,
    loopback: bool,
}

impl Clients {
    /// The client for a host; the error is a message.
    pub fn client(&self, host: &Host, connect: Duration) -> Result<reqwest::Client, String> {
        let connect = host.dial_timeout.unwrap_or(connect);
        let loopback = is_loopback(&authority(&host.base));
        let key = Key { tls: host.tls.clone(), connect, loopback };
        let mut clients = self.0.lock().expect("no holder panics");
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        let client = build(&key)?;
        if clients.len() >= MAX_CLIENTS {
            clients.clear();
        }
        clients.insert(key, client.clone());
        Ok(client)
    }
}

fn build(key: &Key) -> Result<reqwest::Client, String> {
    let mut builder = reqwest::Client::builder()
        .tls_backend_preconfigured(tls_config(&key.tls)?)
        .user_agent(concat!("nacelle/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(key.connect)
        // Redirects are followed in `send`.
        .redirect(Policy::none());
    if key.loopback {
        // For a proxy, loopback is its own machine.
        builder = builder.no_proxy();
    }
    builder.build().map_err(|e| e.to_string())
}

fn tls_config(tls: &Tls) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?;
    let builder = if tls.skip_verify {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(AcceptAny(provider.clone())))
    } else {
        let mut roots = RootCertStore::empty();
        roots.roots.clone_from(&system_roots().roots);
        for file in &tls.authorities {
            for certificate in chain(file)? {
                roots.add(certificate).map_err(|e| wrong(file, &e))?;
            }
        }
        builder.with_root_certificates(roots)
    };
    if tls.identities.is_empty() {
        return Ok(builder.with_no_client_auth());
    }
    let identities = tls
        .identities
        .iter()
        .map(|(certificate, key)| identity(certificate, key, &provider))
        .collect::<Result<_, _>>()?;
    Ok(builder.with_client_cert_resolver(Arc::new(Identities(identities))))
}

fn wrong(file: &Pem, reason: &dyn std::fmt::Display) -> String {
    format!("{}: {reason}", file.path.display())
}

fn chain(file: &Pem) -> Result<Vec<CertificateDer<'static>>, String> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&file.bytes)
        .collect::<Result<_, _>>()
        .map_err(|e| wrong(file, &e))?;
    if chain.is_empty() { Err(wrong(file, &"it has no certificate")) } else { Ok(chain) }
}

fn identity(
    certificate: &Pem,
    key: &Pem,
    provider: &CryptoProvider,
) -> Result<Arc<CertifiedKey>, String> {
    let private = PrivateKeyDer::from_pem_slice(&key.bytes)
        .map_err(|e| wrong(key, &format!("it has no private key that can be read: {e}")))?;
    let identity = CertifiedKey::from_der(chain(certificate)?, private, provider)
        .map_err(|e| format!("{} and its key: {e}", certificate.path.display()))?;
    Ok(Arc::new(identity))
}

/// Client certificates; the one is used whose issuer the server accepts.
#[derive(Debug)]
struct Identities(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for Identities {
    fn resolve(
        &self,
        authorities: &[&[u8]],
        schemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        let usable = || self.0.iter().filter(|one| one.key.choose_scheme(schemes).is_some());
        // The issuer in the same encoding as in the server's list.
        let trusted = |one: &&Arc<CertifiedKey>| {
            one.cert.iter().any(|certificate| {
                authorities
                    .iter()
                    .any(|name| certificate.windows(name.len().max(1)).any(|part| part == *name))
            })
        };
        usable().find(trusted).or_else(|| usable().next()).cloned()
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}

/// The system's certificate authorities, parsed once. Without any, plain http and configured
/// authorities still work.
fn system_roots() -> &'static RootCertStore {
    static ROOTS: OnceLock<RootCertStore> = OnceLock::new();
    ROOTS.get_or_init(|| {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        roots
    })
}

/// Verifier for registries with `skip_verify`.
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
