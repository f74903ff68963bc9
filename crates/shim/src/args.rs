//! The command line as containerd writes it: Go's flag package (`-name value`, `-name=value`, one or
//! two dashes), then the verb.

use std::path::PathBuf;

use anyhow::{Result, bail};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Start,
    Delete,
    /// What `delete` starts, in a process of its own.
    Clean,
    Serve,
    Version,
    Info,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Arguments {
    pub(crate) verb: Verb,
    pub(crate) namespace: String,
    pub(crate) id: String,
    /// containerd's gRPC socket.
    pub(crate) address: String,
    pub(crate) publish_binary: String,
    /// Empty: the working folder.
    pub(crate) bundle: PathBuf,
    pub(crate) debug: bool,
}

/// Longest id and namespace that containerd gives (its pkg/identifiers).
const MAX_NAME: usize = 76;

impl Arguments {
    pub(crate) fn parse(words: &[String]) -> Result<Self> {
        let mut parsed = Self {
            verb: Verb::Serve,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            publish_binary: "containerd".to_owned(),
            bundle: PathBuf::new(),
            debug: false,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                parsed.verb = match word.as_str() {
                    "start" => Verb::Start,
                    "delete" => Verb::Delete,
                    "clean" => Verb::Clean,
                    other => bail!("unknown command {other:?}"),
                };
                break;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "v" | "version" => parsed.verb = Verb::Version,
                "info" => parsed.verb = Verb::Info,
                "debug" => parsed.debug = inline.is_none_or(|value| value == "true"),
                "namespace" | "id" | "address" | "publish-binary" | "bundle" | "socket" => {
                    let Some(value) = inline.or_else(|| words.next().cloned()) else {
                        bail!("flag -{name} needs a value");
                    };
                    match name {
                        "namespace" => parsed.namespace = value,
                        "id" => parsed.id = value,
                        "address" => parsed.address = value,
                        "publish-binary" => parsed.publish_binary = value,
                        "bundle" => parsed.bundle = value.into(),
                        // The shim chooses its own socket.
                        _ => {}
                    }
                }
                _ => bail!("unknown flag -{name}"),
            }
        }
        if matches!(parsed.verb, Verb::Start | Verb::Delete | Verb::Clean | Verb::Serve) {
            check("namespace", &parsed.namespace)?;
            check("id", &parsed.id)?;
        }
        Ok(parsed)
    }

    /// The bundle's folder.
    pub(crate) fn bundle(&self) -> Result<PathBuf> {
        if self.bundle.as_os_str().is_empty() {
            return Ok(std::env::current_dir()?);
        }
        Ok(std::path::absolute(&self.bundle)?)
    }

    /// The same call as the shim itself.
    pub(crate) fn to_serve(&self) -> Vec<String> {
        let mut words: Vec<String> = ["-namespace", &self.namespace, "-id", &self.id]
            .into_iter()
            .chain(["-address", &self.address, "-publish-binary", &self.publish_binary])
            .map(str::to_owned)
            .collect();
        if self.debug {
            words.push("-debug".to_owned());
        }
        words
    }
}

/// Names become parts of paths.
pub(crate) fn check(what: &str, name: &str) -> Result<()> {
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
    if name.is_empty() || name.len() > MAX_NAME || !plain || name.starts_with('.') {
        bail!("{what} {name:?} is not 1 to {MAX_NAME} letters, digits, `_`, `-` and `.`");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments> {
        Arguments::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn the_calls_that_containerd_makes_are_understood() {
        let start = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock \
             -publish-binary /usr/bin/containerd -id abc -debug start",
        )
        .unwrap();
        assert_eq!(start.verb, Verb::Start);
        assert_eq!((start.namespace.as_str(), start.id.as_str()), ("k8s.io", "abc"));
        assert!(start.debug);
        let again = Arguments::parse(&start.to_serve()).unwrap();
        assert_eq!(again, Arguments { verb: Verb::Serve, ..start });
        let delete = parse("--namespace=default --id=a --bundle=/b delete").unwrap();
        assert_eq!((delete.verb, delete.bundle), (Verb::Delete, PathBuf::from("/b")));
        assert_eq!(parse("-v").unwrap().verb, Verb::Version);
        assert_eq!(parse("-info").unwrap().verb, Verb::Info);
    }

    #[test]
    fn what_could_lead_elsewhere_is_refused() {
        for line in [
            "-namespace a -id ../x start",
            "-namespace a -id .. start",
            "-namespace a/b -id x start",
            "-namespace a start",
            "-namespace a -id x stop",
            "-namespace a -id",
            "-nonsense",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
