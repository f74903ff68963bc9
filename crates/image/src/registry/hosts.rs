//! Hosts of a registry: the directories of `config_path`, in the layout and format of containerd
//! (docs/hosts.md and core/remotes/docker/config of containerd 2).
//!
//! ```text
//! <directory>/<registry>/hosts.toml     mirrors in order, and the server after them
//! <directory>/<registry>/*.crt          or, without that file, certificate authorities
//! <directory>/<registry>/*.cert, *.key  and client certificates with their keys
//! <directory>/_default/...              for registries without a directory of their own
//! ```
//!
//! A port is written in a directory's name as `host_5000_` or `host:5000`. Read at each pull, so a
//! change needs no restart. An invalid file fails the pull with its name and line: ignoring it
//! would bypass the configured mirror.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use toml::Spanned;

use super::authority::{authority, is_loopback};

/// Maximum size in bytes of a host file: a wrong path must not make a pull read gigabytes.
const MAX_FILE: u64 = 1 << 20;
const MAX_HOSTS: usize = 64;
const MAX_CERTIFICATES: usize = 64;
const DEFAULT: &str = "_default";

/// One host from which a registry's images can be fetched.
#[derive(Clone)]
pub struct Host {
    /// Root of the API, usually ending in `/v2`; without a trailing slash.
    pub base: Url,
    /// Capability `pull`: serves blobs, and manifests by digest.
    pub pull: bool,
    /// Capability `resolve`: resolves tags.
    pub resolve: bool,
    /// A mirror: gets the registry's name in the `ns` parameter.
    pub mirror: bool,
    /// Used only if the previous host speaks another protocol.
    pub fallback: bool,
    pub tls: Tls,
    pub headers: HeaderMap,
    pub dial_timeout: Option<Duration>,
}

/// TLS settings with the files' contents: equal values share a client.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Tls {
    pub authorities: Vec<Pem>,
    /// Certificate and key; may be the same file.
    pub identities: Vec<(Pem, Pem)>,
    pub skip_verify: bool,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Pem {
    pub path: PathBuf,
    pub bytes: Arc<[u8]>,
}

/// The hosts of a registry in the order of use; the error is a message.
pub fn hosts(config_path: &str, registry: &str) -> Result<Vec<Host>, String> {
    match directory(config_path, registry)? {
        Some(directory) => read(&directory, registry),
        None => default_hosts(registry, Root::default()),
    }
}

fn directory(config_path: &str, registry: &str) -> Result<Option<PathBuf>, String> {
    let mut names = Vec::new();
    if let Some((host, port)) = registry.rsplit_once(':') {
        names.push(format!("{host}_{port}_"));
    }
    names.extend([registry.to_owned(), DEFAULT.to_owned()]);
    for root in config_path.split(':').filter(|root| !root.is_empty()) {
        for name in &names {
            let path = Path::new(root).join(name);
            match fs::metadata(&path) {
                Ok(_) => return Ok(Some(path)),
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(format!("{}: {e}", path.display())),
            }
        }
    }
    Ok(None)
}

fn read(directory: &Path, registry: &str) -> Result<Vec<Host>, String> {
    let path = directory.join("hosts.toml");
    let bytes = match read_small(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(format!("{}: {e}", path.display())),
    };
    if bytes.is_empty() {
        return default_hosts(registry, certificates(directory)?);
    }
    let text = String::from_utf8(bytes).map_err(|e| format!("{}: {e}", path.display()))?;
    let at = |span: std::ops::Range<usize>, reason: &str| {
        let line = text[..span.start.min(text.len())].matches('\n').count() + 1;
        format!("{}:{line}: {reason}", path.display())
    };
    let wrong = |e: toml::de::Error| at(e.span().unwrap_or_default(), e.message().trim());
    let file: File = toml::from_str(&text).map_err(wrong)?;
    let root: Table = toml::from_str(&text).map_err(wrong)?;
    let mut tables: Vec<_> = file.host.into_iter().collect();
    if tables.len() > MAX_HOSTS {
        return Err(at(0..0, &format!("more than {MAX_HOSTS} hosts")));
    }
    // The order of the file is the order of use.
    tables.sort_by_key(|(name, _)| name.span().start);
    let mut hosts = Vec::new();
    for (name, table) in tables {
        let base =
            base(name.get_ref(), table.override_path).map_err(|reason| at(name.span(), &reason))?;
        let (pull, resolve) = table.capabilities(&at)?;
        let root = table.root(directory, &at)?;
        hosts.extend(with_fallback(base, registry, pull, resolve, root));
    }
    let settings = root.root(directory, &at)?;
    match file.server.filter(|server| !server.get_ref().is_empty()) {
        Some(server) => {
            let base = base(server.get_ref(), root.override_path)
                .map_err(|reason| at(server.span(), &reason))?;
            let (pull, resolve) = root.capabilities(&at)?;
            hosts.extend(with_fallback(base, registry, pull, resolve, settings));
        }
        None => hosts.extend(default_hosts(registry, settings)?),
    }
    Ok(hosts)
}

/// Settings of one host apart from its address.
#[derive(Default)]
struct Root {
    authorities: Vec<Pem>,
    identities: Vec<(Pem, Pem)>,
    skip_verify: Option<bool>,
    headers: HeaderMap,
    dial_timeout: Option<Duration>,
}

impl Root {
    fn has_tls_settings(&self) -> bool {
        !self.authorities.is_empty() || !self.identities.is_empty() || self.skip_verify.is_some()
    }

    fn host(self, base: Url, registry: &str, pull: bool, resolve: bool) -> Host {
        let authority = authority(&base);
        let own = authority == registry
            || (registry == "docker.io" && authority == "registry-1.docker.io");
        Host {
            base,
            pull,
            resolve,
            mirror: !own,
            fallback: false,
            tls: Tls {
                authorities: self.authorities,
                identities: self.identities,
                skip_verify: self.skip_verify.unwrap_or(false),
            },
            headers: self.headers,
            dial_timeout: self.dial_timeout,
        }
    }
}

/// An http address with TLS settings is first tried with TLS.
fn with_fallback(base: Url, registry: &str, pull: bool, resolve: bool, root: Root) -> Vec<Host> {
    let both = base.scheme() == "http" && root.has_tls_settings();
    let plain = root.host(base, registry, pull, resolve);
    if !both {
        return vec![plain];
    }
    let mut secure = plain.clone();
    // http and https are both special schemes, so the change cannot fail.
    let _ = secure.base.set_scheme("https");
    vec![secure, Host { fallback: true, ..plain }]
}

/// The registry itself.
fn default_hosts(registry: &str, mut root: Root) -> Result<Vec<Host>, String> {
    let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
    let url = |scheme: &str| {
        let text = format!("{scheme}://{host}/v2");
        text.parse::<Url>().map_err(|e| format!("{text}: {e}"))
    };
    if !is_loopback(registry) {
        return Ok(vec![root.host(url("https")?, registry, true, true)]);
    }
    // Registries on loopback are for tests and rarely have a valid certificate.
    let has_tls_settings = root.has_tls_settings();
    root.skip_verify = root.skip_verify.or((!has_tls_settings).then_some(true));
    let secure = root.host(url("https")?, registry, true, true);
    let plain = Host { base: url("http")?, ..secure.clone() };
    Ok(match registry.rsplit_once(':').map(|(_, port)| port) {
        _ if has_tls_settings => vec![secure, Host { fallback: true, ..plain }],
        None | Some("443") => vec![secure],
        Some("80") => vec![plain],
        Some(_) => vec![plain, Host { fallback: true, ..secure }],
    })
}

/// `hosts.toml` without the top-level [`Table`]. Unknown keys are ignored as in containerd, for
/// compatibility with later versions.
#[derive(Deserialize)]
struct File {
    server: Option<Spanned<String>>,
    #[serde(default)]
    host: BTreeMap<Spanned<String>, Table>,
}

/// Settings of one host.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Table {
    capabilities: Vec<Spanned<String>>,
    ca: Option<Strings>,
    client: Option<Clients>,
    skip_verify: Option<bool>,
    header: BTreeMap<Spanned<String>, Strings>,
    override_path: bool,
    dial_timeout: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a string or a list of strings")]
enum Strings {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a file, a list of files, or a list of [certificate, key]")]
enum Clients {
    One(String),
    Many(Vec<ClientFiles>),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a file or [certificate, key]")]
enum ClientFiles {
    /// Certificate and key in one file.
    Both(String),
    Pair([String; 2]),
}

impl Strings {
    fn list(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

type At<'a> = dyn Fn(std::ops::Range<usize>, &str) -> String + 'a;

impl Table {
    /// Capabilities `pull` and `resolve`.
    fn capabilities(&self, at: &At<'_>) -> Result<(bool, bool), String> {
        if self.capabilities.is_empty() {
            return Ok((true, true));
        }
        let (mut pull, mut resolve) = (false, false);
        for capability in &self.capabilities {
            match capability.get_ref().to_ascii_lowercase().as_str() {
                "pull" => pull = true,
                "resolve" => resolve = true,
                // Not used by this node.
                "push" | "referrers" => {}
                other => {
                    let reason = format!("{other:?} is not a capability: pull, resolve or push");
                    return Err(at(capability.span(), &reason));
                }
            }
        }
        Ok((pull, resolve))
    }

    fn root(&self, directory: &Path, at: &At<'_>) -> Result<Root, String> {
        let mut root = Root { skip_verify: self.skip_verify, ..Root::default() };
        for file in self.ca.iter().flat_map(Strings::list) {
            root.authorities.push(pem(&directory.join(file))?);
        }
        let pair = |certificate: &str, key: &str| {
            Ok::<_, String>((pem(&directory.join(certificate))?, pem(&directory.join(key))?))
        };
        match &self.client {
            None => {}
            Some(Clients::One(file)) => root.identities.push(pair(file, file)?),
            Some(Clients::Many(files)) => {
                for file in files {
                    root.identities.push(match file {
                        ClientFiles::Both(file) => pair(file, file)?,
                        ClientFiles::Pair([certificate, key]) => pair(certificate, key)?,
                    });
                }
            }
        }
        for (name, values) in &self.header {
            let bad = |reason: &dyn std::fmt::Display| {
                at(name.span(), &format!("header {:?}: {reason}", name.get_ref()))
            };
            let key: HeaderName = name.get_ref().parse().map_err(|e| bad(&e))?;
            for value in values.list() {
                let mut value = HeaderValue::from_str(value).map_err(|e| bad(&e))?;
                value.set_sensitive(true);
                root.headers.append(key.clone(), value);
            }
        }
        if let Some(text) = &self.dial_timeout {
            let parsed = duration(text.get_ref());
            let bad = || at(text.span(), "dial_timeout is not a duration such as \"10s\"");
            root.dial_timeout = Some(parsed.ok_or_else(bad)?);
        }
        Ok(root)
    }
}

/// The API's root for an address, which may lack the scheme.
fn base(server: &str, override_path: bool) -> Result<Url, String> {
    let full = match server.contains("://") {
        true => server.to_owned(),
        false => format!("https://{server}"),
    };
    let mut url: Url = full.parse().map_err(|e| format!("{server:?} is not an address: {e}"))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(format!("{server:?} is neither an http nor an https address"));
    }
    url.set_query(None);
    url.set_fragment(None);
    let mut path = url.path().trim_end_matches('/').to_owned();
    if !override_path && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    url.set_path(&path);
    Ok(url)
}

/// Certificates in docker's layout.
fn certificates(directory: &Path) -> Result<Root, String> {
    let bad = |e: std::io::Error| format!("{}: {e}", directory.display());
    let mut names = Vec::new();
    match fs::read_dir(directory) {
        Ok(entries) => {
            for entry in entries {
                names.extend(entry.map_err(bad)?.file_name().into_string());
            }
        }
        Err(e) => return Err(bad(e)),
    }
    names.retain(|name| name.ends_with(".crt") || name.ends_with(".cert"));
    names.sort();
    if names.len() > MAX_CERTIFICATES {
        return Err(format!("{}: more than {MAX_CERTIFICATES} certificates", directory.display()));
    }
    let mut root = Root::default();
    for name in names {
        let path = directory.join(&name);
        if path.is_dir() {
            continue;
        }
        let file = pem(&path)?;
        match name.strip_suffix(".cert") {
            None => root.authorities.push(file),
            Some(stem) => {
                let key = directory.join(format!("{stem}.key"));
                let key = if key.exists() { pem(&key)? } else { file.clone() };
                root.identities.push((file, key));
            }
        }
    }
    Ok(root)
}

fn pem(path: &Path) -> Result<Pem, String> {
    let bytes = read_small(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(Pem { path: path.to_owned(), bytes: bytes.into() })
}

fn read_small(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > MAX_FILE {
        true => Err(ErrorKind::FileTooLarge.into()),
        false => Ok(bytes),
    }
}

/// Parses a Go duration: `1m30s`, `1.5s`, `250ms`.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let seconds = match &rest[..unit] {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
        rest = &rest[unit..];
    }
    (total > Duration::ZERO).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `config_path` directory with one file in it.
    fn file(name: &str, text: &str) -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        let root = dir.path().to_str().unwrap().to_owned();
        (dir, root)
    }

    fn urls(hosts: &[Host]) -> Vec<String> {
        hosts.iter().map(|host| host.base.to_string()).collect()
    }

    fn reason(text: &str) -> String {
        let (_dir, root) = file("reg.io/hosts.toml", text);
        hosts(&root, "reg.io").err().unwrap_or_else(|| panic!("understood: {text}"))
    }

    #[test]
    fn without_files_a_registry_is_contacted_by_its_name() {
        let of = |registry| urls(&hosts("/nowhere:/neither", registry).unwrap());
        assert_eq!(of("docker.io"), ["https://registry-1.docker.io/v2"]);
        assert_eq!(of("quay.io:8443"), ["https://quay.io:8443/v2"]);
        assert_eq!(of("127.0.0.1:5000"), ["http://127.0.0.1:5000/v2", "https://127.0.0.1:5000/v2"]);
        assert_eq!(of("localhost"), ["https://localhost/v2"]);
        let hosts = hosts("", "localhost:5000").unwrap();
        assert!(!hosts[0].fallback && hosts[1].fallback && hosts[1].tls.skip_verify);
        assert!(!hosts[0].mirror);
    }

    #[test]
    fn hosts_are_tried_in_the_order_of_the_file_and_the_server_last() {
        let text = r#"
            server = "https://upstream.example"
            [host."https://zz.example"]
            capabilities = ["pull"]
            dial_timeout = "1m1.5s"
            [host."https://zz.example".header]
            x-one = "1"
            x-two = ["2", "3"]
            [host."http://aa.example:5000/mirror/"]
            capabilities = ["Pull", "resolve", "push"]
            [host."bare.example/api/v2"]
            [host."https://odd.example/raw"]
            override_path = true
            [host."https://root.example"]
            override_path = true
            unknown_key = "of a later version"
        "#;
        let (_dir, root) = file("docker.io/hosts.toml", text);
        let hosts = hosts(&format!("/nowhere:{root}"), "docker.io").unwrap();
        assert_eq!(
            urls(&hosts),
            [
                "https://zz.example/v2",
                "http://aa.example:5000/mirror/v2",
                "https://bare.example/api/v2",
                "https://odd.example/raw",
                "https://root.example/",
                "https://upstream.example/v2",
            ]
        );
        let first = &hosts[0];
        assert!(first.pull && !first.resolve && first.mirror);
        assert_eq!(first.headers.get_all("x-two").iter().count(), 2);
        assert_eq!(first.dial_timeout, Some(Duration::from_millis(61_500)));
        assert!(hosts[1].pull && hosts[1].resolve);
    }

    #[test]
    fn a_file_without_server_ends_with_the_registry_itself_and_its_settings() {
        let text = "skip_verify = true\n[host.\"https://mirror.example\"]\n";
        let (_dir, root) = file("_default/hosts.toml", text);
        let hosts = hosts(&root, "docker.io").unwrap();
        assert_eq!(urls(&hosts), ["https://mirror.example/v2", "https://registry-1.docker.io/v2"]);
        assert!(!hosts[0].tls.skip_verify && hosts[1].tls.skip_verify);
        assert!(hosts[0].mirror && !hosts[1].mirror);
    }

    #[test]
    fn a_port_in_a_directory_name_has_two_spellings_and_both_override_the_default() {
        let (dir, root) = file("_default/hosts.toml", "server = \"https://default.example\"");
        let put = |name: &str| {
            fs::create_dir(dir.path().join(name)).unwrap();
            let text = format!("server = \"https://{}.example\"", name.replace([':', '_'], "-"));
            fs::write(dir.path().join(name).join("hosts.toml"), text).unwrap();
        };
        let of = || urls(&hosts(&root, "reg.io:5000").unwrap());
        assert_eq!(of(), ["https://default.example/v2"]);
        put("reg.io:5000");
        assert_eq!(of(), ["https://reg.io-5000.example/v2"]);
        put("reg.io_5000_");
        assert_eq!(of(), ["https://reg.io-5000-.example/v2"]);
    }

    #[test]
    fn certificates_are_read_in_every_form() {
        let text = r#"
            ca = "ca.pem"
            client = [["c.pem", "c.key"], "both.pem"]
            [host."https://one.example"]
            ca = ["ca.pem", "/abs.pem"]
            client = "both.pem"
            [host."https://two.example"]
            client = ["both.pem", "c.pem"]
        "#;
        let (dir, root) = file("reg.io/hosts.toml", text);
        for name in ["ca.pem", "c.pem", "c.key", "both.pem"] {
            fs::write(dir.path().join("reg.io").join(name), name).unwrap();
        }
        let error = hosts(&root, "reg.io").err().unwrap();
        assert!(error.contains("/abs.pem"), "{error}");
        let text = text.replace("/abs.pem", "c.pem");
        fs::write(dir.path().join("reg.io/hosts.toml"), text).unwrap();
        let hosts = hosts(&root, "reg.io").unwrap();
        let pairs = |host: &Host| {
            let text = |pem: &Pem| String::from_utf8(pem.bytes.to_vec()).unwrap();
            host.tls.identities.iter().map(|(c, k)| (text(c), text(k))).collect::<Vec<_>>()
        };
        let pair = |c: &str, k: &str| (c.to_owned(), k.to_owned());
        assert_eq!(hosts[0].tls.authorities.len(), 2);
        assert_eq!(pairs(&hosts[0]), [pair("both.pem", "both.pem")]);
        assert_eq!(pairs(&hosts[1]), [pair("both.pem", "both.pem"), pair("c.pem", "c.pem")]);
        assert_eq!(pairs(&hosts[2]), [pair("c.pem", "c.key"), pair("both.pem", "both.pem")]);
    }

    #[test]
    fn certificates_in_dockers_layout_are_found() {
        let (dir, root) = file("reg.io/ca.crt", "authority");
        for name in ["a.cert", "a.key", "b.cert", "readme.txt"] {
            fs::write(dir.path().join("reg.io").join(name), name).unwrap();
        }
        let hosts = hosts(&root, "reg.io").unwrap();
        assert_eq!(urls(&hosts), ["https://reg.io/v2"]);
        let tls = &hosts[0].tls;
        assert_eq!((tls.authorities.len(), tls.identities.len()), (1, 2));
        assert_eq!(&*tls.identities[0].1.bytes, b"a.key");
        assert_eq!(&*tls.identities[1].1.bytes, b"b.cert");
    }

    #[test]
    fn http_with_tls_settings_is_first_tried_with_tls() {
        let text = "[host.\"http://m.example:5000\"]\nskip_verify = true\n";
        let (_dir, root) = file("reg.io/hosts.toml", text);
        let hosts = hosts(&root, "reg.io").unwrap();
        assert_eq!(
            urls(&hosts),
            ["https://m.example:5000/v2", "http://m.example:5000/v2", "https://reg.io/v2"]
        );
        assert!(!hosts[0].fallback && hosts[1].fallback && !hosts[2].fallback);
    }

    #[test]
    fn invalid_files_are_reported_with_file_and_line() {
        for (text, line, word) in [
            ("server = ", 1, ""),
            ("\n\n[host", 3, ""),
            ("server = 5", 1, "string"),
            ("server = \"ftp://x\"", 1, "ftp://x"),
            ("\n[host.\"https://\"]", 2, "https://"),
            ("[host.\"https://a\"]\ncapabilities = [\"pull\",\n\"fly\"]", 3, "fly"),
            ("[host.\"https://a\"]\nca = 7", 2, "list of strings"),
            ("[host.\"https://a\"]\nclient = [[\"a\"]]", 2, "[certificate, key]"),
            ("[host.\"https://a\"]\nskip_verify = \"yes\"", 2, "boolean"),
            ("[host.\"https://a\".header]\n\"a b\" = \"x\"", 2, "a b"),
            ("[host.\"https://a\".header]\na = \"x\\n\"", 2, "header"),
            ("[host.\"https://a\"]\ndial_timeout = \"soon\"", 2, "dial_timeout"),
            ("[host.\"https://a\"]\n[host.\"https://a\"]", 2, "duplicate"),
        ] {
            let error = reason(text);
            let place = format!("reg.io/hosts.toml:{line}: ");
            assert!(error.contains(&place) && error.contains(word), "{text:?}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
        let error = reason("ca = \"nowhere.pem\"");
        assert!(error.contains("reg.io/nowhere.pem"), "{error}");
        let error = reason(&"#".repeat(2 << 20));
        assert!(error.contains("reg.io/hosts.toml"), "{error}");
    }

    #[test]
    fn go_durations_are_parsed() {
        for (text, milliseconds) in
            [("10s", 10_000), ("250ms", 250), ("1.5s", 1500), ("1h1m1s", 3_661_000)]
        {
            assert_eq!(duration(text), Some(Duration::from_millis(milliseconds)), "{text}");
        }
        for bad in ["", "10", "s", "-1s", "1d", "0s", "..s", "9999999999999999999h"] {
            assert_eq!(duration(bad), None, "{bad}");
        }
    }
}
