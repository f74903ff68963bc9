//! Image references in the grammar of the distribution project, as Docker and containerd parse
//! them: `[registry/]repository[:tag][@digest]`.

use std::fmt;
use std::str::FromStr;

use crate::digest::Digest;
use crate::error::Error;

const DEFAULT_REGISTRY: &str = "docker.io";
const DEFAULT_TAG: &str = "latest";
/// Maximum length in bytes of the name without tag and digest.
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// A complete reference: registry, repository, and a tag or a digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    /// Host and optional port.
    pub registry: String,
    pub repository: String,
    pub target: Target,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    Tag(String),
    Digest(Digest),
}

impl Reference {
    /// `registry/repository`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { target: Target::Digest(digest), ..self.clone() }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Tag(tag) => write!(f, "{}/{}:{tag}", self.registry, self.repository),
            Target::Digest(digest) => write!(f, "{}/{}@{digest}", self.registry, self.repository),
        }
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = |reason| Error::InvalidReference {
            reference: text.chars().take(160).collect(),
            reason,
        };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let digest = digest.parse().map_err(|_| bad("its digest is not sha256:<hex>"))?;
                (rest, Some(digest))
            }
            None => (text, None),
        };
        // A colon before a slash starts a port.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if name.is_empty() {
            return Err(bad("it has no repository"));
        }
        if name.len() > MAX_NAME {
            return Err(bad("its name is longer than 255 bytes"));
        }
        if Digest::from_hex(name).is_some() {
            return Err(bad("sixty-four hexadecimal digits are an image id"));
        }
        let (registry, repository) = match name.split_once('/') {
            Some((first, rest)) if is_registry(first) => (first, rest),
            _ => (DEFAULT_REGISTRY, name),
        };
        let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
        if !valid_registry(registry) {
            return Err(bad("its registry is not a host name with an optional port"));
        }
        if !repository.split('/').all(valid_component) {
            return Err(bad("its repository must be lower-case words of letters, digits, `.`, \
                            `_` and `-`, with slashes between them"));
        }
        let repository = match registry {
            DEFAULT_REGISTRY if !repository.contains('/') => format!("library/{repository}"),
            _ => repository.to_owned(),
        };
        if tag.is_some_and(|tag| !valid_tag(tag)) {
            return Err(bad("its tag must be up to 128 letters, digits, `.`, `_` and `-`"));
        }
        // With tag and digest, the digest is used, as in containerd.
        let target = match digest {
            Some(digest) => Target::Digest(digest),
            None => Target::Tag(tag.unwrap_or(DEFAULT_TAG).to_owned()),
        };
        Ok(Self { registry: registry.to_owned(), repository, target })
    }
}

/// Whether the first component is a registry host.
fn is_registry(component: &str) -> bool {
    component == "localhost"
        || component.contains(['.', ':'])
        || component.chars().any(|c| c.is_ascii_uppercase())
}

fn valid_registry(registry: &str) -> bool {
    let (host, port) = match registry.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (registry, None),
    };
    let valid_port = |port: &str| port.parse::<u16>().is_ok_and(|port| port != 0);
    let v6 = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let valid_host = match v6 {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
        }),
    };
    valid_host && port.is_none_or(valid_port)
}

/// Lower-case letters and digits, separated by one `.`, one or two `_`, or any number of `-`.
fn valid_component(component: &str) -> bool {
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    component.starts_with(alphanumeric)
        && component.ends_with(alphanumeric)
        && component
            .split(alphanumeric)
            .all(|gap| matches!(gap, "" | "." | "_" | "__") || gap.chars().all(|c| c == '-'))
}

fn valid_tag(tag: &str) -> bool {
    tag.len() <= MAX_TAG
        && tag.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && tag.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(text: &str) -> String {
        text.parse::<Reference>().unwrap_or_else(|e| panic!("{text}: {e}")).to_string()
    }

    #[test]
    fn short_names_are_completed_as_docker_does() {
        let digest = Digest::of(b"");
        for (short, expected) in [
            ("nginx", "docker.io/library/nginx:latest".to_owned()),
            ("nginx:1.27", "docker.io/library/nginx:1.27".to_owned()),
            ("user/app", "docker.io/user/app:latest".to_owned()),
            ("index.docker.io/nginx", "docker.io/library/nginx:latest".to_owned()),
            ("localhost/x", "localhost/x:latest".to_owned()),
            ("localhost:5000/x", "localhost:5000/x:latest".to_owned()),
            ("127.0.0.1:5000/a/b__c/d:T", "127.0.0.1:5000/a/b__c/d:T".to_owned()),
            ("[::1]:5000/a", "[::1]:5000/a:latest".to_owned()),
            ("quay.io/a/b-c:v1", "quay.io/a/b-c:v1".to_owned()),
        ] {
            assert_eq!(full(short), expected);
        }
        assert_eq!(full(&format!("a@{digest}")), format!("docker.io/library/a@{digest}"));
        assert_eq!(full(&format!("a:1@{digest}")), format!("docker.io/library/a@{digest}"));
    }

    #[test]
    fn a_complete_name_is_unchanged() {
        for text in ["nginx", "localhost:5000/x:1", "[::1]:5000/a"] {
            assert_eq!(full(&full(text)), full(text));
        }
    }

    #[test]
    fn bad_names_are_refused() {
        let long = "a".repeat(300);
        for bad in [
            "",
            ":",
            "@",
            "a:",
            "a@",
            "a@sha256:12",
            "UPPER",
            "a//b",
            "a/../b",
            "/a",
            "a/",
            "a b",
            "-a",
            "a:b:c",
            "host:99999/a",
            "host:/a",
            "a:-x",
            "a\n",
            &long,
            "a___b",
            "a._b",
            "ho_st.io/a",
            &"0a".repeat(32),
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?}");
        }
    }
}
