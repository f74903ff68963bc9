//! The command line as containerd writes it: Go's flag package (`-name value`, `-name=value`, one or
//! two dashes), then the action.

use std::path::PathBuf;

use anyhow::{Result, bail};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Start,
    Delete,
    /// Removes a pod without a shim. Started by `delete`, `start` and the serving shim as a separate
    /// process; `id` is the pod's key.
    Cleanup,
    Serve,
    Version,
    Info,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Arguments {
    pub(crate) action: Action,
    pub(crate) namespace: String,
    pub(crate) id: String,
    /// containerd's gRPC socket.
    pub(crate) address: String,
    pub(crate) publish_binary: String,
    /// Empty: the working directory.
    pub(crate) bundle: PathBuf,
    pub(crate) debug: bool,
}

/// Maximum length of an id or namespace (containerd's pkg/identifiers).
const MAX_ID_LENGTH: usize = 76;

impl Arguments {
    pub(crate) fn parse(args: &[String]) -> Result<Self> {
        let mut parsed = Self {
            action: Action::Serve,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            publish_binary: "containerd".to_owned(),
            bundle: PathBuf::new(),
            debug: false,
        };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
                parsed.action = match arg.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    "cleanup" => Action::Cleanup,
                    other => bail!("unknown command {other:?}"),
                };
                break;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "v" | "version" => parsed.action = Action::Version,
                "info" => parsed.action = Action::Info,
                "debug" => parsed.debug = inline.is_none_or(|value| value == "true"),
                "namespace" | "id" | "address" | "publish-binary" | "bundle" | "socket" => {
                    let Some(value) = inline.or_else(|| args.next().cloned()) else {
                        bail!("flag -{name} needs a value");
                    };
                    match name {
                        "namespace" => parsed.namespace = value,
                        "id" => parsed.id = value,
                        "address" => parsed.address = value,
                        "publish-binary" => parsed.publish_binary = value,
                        "bundle" => parsed.bundle = value.into(),
                        // Ignored: the shim chooses its own socket.
                        _ => {}
                    }
                }
                _ => bail!("unknown flag -{name}"),
            }
        }
        if matches!(parsed.action, Action::Start | Action::Delete | Action::Serve) {
            validate_id("namespace", &parsed.namespace)?;
        }
        if !matches!(parsed.action, Action::Version | Action::Info) {
            validate_id("id", &parsed.id)?;
        }
        Ok(parsed)
    }

    /// The bundle directory.
    pub(crate) fn bundle(&self) -> Result<PathBuf> {
        if self.bundle.as_os_str().is_empty() {
            return Ok(std::env::current_dir()?);
        }
        Ok(std::path::absolute(&self.bundle)?)
    }

    /// Arguments of the serving shim.
    pub(crate) fn serve_args(&self) -> Vec<String> {
        let mut args: Vec<String> = ["-namespace", &self.namespace, "-id", &self.id]
            .into_iter()
            .chain(["-address", &self.address, "-publish-binary", &self.publish_binary])
            .map(str::to_owned)
            .collect();
        if self.debug {
            args.push("-debug".to_owned());
        }
        args
    }
}

/// Ids and namespaces become parts of paths.
pub(crate) fn validate_id(what: &str, name: &str) -> Result<()> {
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
    if name.is_empty() || name.len() > MAX_ID_LENGTH || !plain || name.starts_with('.') {
        bail!("{what} {name:?} is not 1 to {MAX_ID_LENGTH} letters, digits, `_`, `-` and `.`");
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
    fn the_command_lines_of_containerd_are_parsed() {
        let start = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock \
             -publish-binary /usr/bin/containerd -id abc -debug start",
        )
        .unwrap();
        assert_eq!(start.action, Action::Start);
        assert_eq!((start.namespace.as_str(), start.id.as_str()), ("k8s.io", "abc"));
        assert!(start.debug);
        let again = Arguments::parse(&start.serve_args()).unwrap();
        assert_eq!(again, Arguments { action: Action::Serve, ..start });
        let delete = parse("--namespace=default --id=a --bundle=/b delete").unwrap();
        assert_eq!((delete.action, delete.bundle), (Action::Delete, PathBuf::from("/b")));
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
    }

    #[test]
    fn invalid_ids_actions_and_flags_are_refused() {
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
