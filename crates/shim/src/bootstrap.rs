//! `start`: finds or starts the shim that serves a task, and writes the start response.
//!
//! | containerd | standard input | what it reads |
//! |---|---|---|
//! | 1.6 | options of the runtime, or nothing | an address |
//! | 1.7 to 2.2 | the same | an address, or JSON |
//! | 2.3 and later | BootstrapParams (protobuf) | BootstrapResult (protobuf) |
//!
//! A plain address means version 2 of the task API, which all of them support. Output on standard
//! error would become part of the response.

use std::fs;
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};

use crate::args::Arguments;
use crate::paths::PodPaths;
use crate::settings::Settings;
use crate::spec::{self, ContainerType};

/// Maximum size of standard input, bytes.
const MAX_INPUT: u64 = 1 << 20;
/// Task API version in a BootstrapResult.
const VERSION: i32 = 3;
/// Time for a shim that is being started to accept connections.
const START_TIMEOUT: Duration = Duration::from_secs(2);

pub(crate) fn start(arguments: &Arguments) -> Result<()> {
    let mut input = Vec::new();
    if !std::io::stdin().is_terminal() {
        std::io::stdin().take(MAX_INPUT).read_to_end(&mut input).context("reading the options")?;
    }
    let settings = Settings::load()?;
    let bundle = arguments.bundle()?;
    let pod = match spec::container_type(&spec::read(&bundle)?)? {
        ContainerType::PodContainer { pod } if pod != arguments.id => Some(pod),
        _ => None,
    };
    let paths =
        PodPaths::new(&settings, &arguments.namespace, pod.as_ref().unwrap_or(&arguments.id));
    match pod {
        Some(pod) => {
            if !wait_until_alive(&paths) {
                bail!("pod {pod} of container {} has no running shim", arguments.id);
            }
        }
        None if paths.is_alive() => {}
        None => spawn_shim(arguments, &bundle, &paths)?,
    }
    let address = paths.address();
    // containerd reconnects to its shims by this file after a restart.
    fs::write(bundle.join("address"), &address).context("writing the address")?;
    let mut output = std::io::stdout();
    output.write_all(&encode_response(&input, arguments, address)?)?;
    output.flush()?;
    Ok(())
}

fn wait_until_alive(paths: &PodPaths) -> bool {
    let until = std::time::Instant::now() + START_TIMEOUT;
    while !paths.is_alive() {
        if std::time::Instant::now() > until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Encodes the start response for the calling containerd version.
fn encode_response(input: &[u8], arguments: &Arguments, address: String) -> Result<Vec<u8>> {
    // The `Any` with runtime options of an older containerd parses as BootstrapParams as well.
    let speaks_bootstrap = BootstrapParams::parse_from_bytes(input).is_ok_and(|params| {
        params.instance_id == arguments.id && params.namespace == arguments.namespace
    });
    if !speaks_bootstrap {
        return Ok(address.into_bytes());
    }
    let protocol = "ttrpc".to_owned();
    let result = BootstrapResult { version: VERSION, address, protocol, ..Default::default() };
    Ok(result.write_to_bytes()?)
}

/// Creates the socket and starts the shim with it.
fn spawn_shim(arguments: &Arguments, bundle: &Path, paths: &PodPaths) -> Result<()> {
    paths.create_dirs()?;
    let path = paths.socket();
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing {}", path.display()));
        }
        _ => {}
    }
    let listener =
        UnixListener::bind(&path).with_context(|| format!("listening at {}", path.display()))?;
    let program = std::env::current_exe().context("finding the shim's own program")?;
    let mut command = Command::new(program);
    command
        .args(arguments.serve_args())
        .current_dir(bundle)
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // A process group of its own: signals to containerd's group must not reach it.
        .process_group(0);
    command.spawn().context("starting the shim")?;
    Ok(())
}

/// `-info`: prints a RuntimeInfo.
pub(crate) fn info() -> Result<()> {
    let info = RuntimeInfo {
        name: crate::RUNTIME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    };
    std::io::stdout().write_all(&info.write_to_bytes()?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    use super::*;

    fn arguments() -> Arguments {
        let args = ["-namespace", "k8s.io", "-id", "abc", "start"].map(str::to_owned);
        Arguments::parse(&args).unwrap()
    }

    #[test]
    fn each_containerd_version_gets_a_response_that_it_accepts() {
        let address = "unix:///run/nacelle-shim/x/shim.sock";
        let answer =
            |input: &[u8]| encode_response(input, &arguments(), address.to_owned()).unwrap();
        // 1.6 and 1.7 without options.
        assert_eq!(answer(b""), address.as_bytes());
        // Up to 2.2 with options, which parse as BootstrapParams as well.
        let options = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: b"\x0a\x01x".to_vec(),
            ..Default::default()
        };
        let options = options.write_to_bytes().unwrap();
        assert!(BootstrapParams::parse_from_bytes(&options).is_ok());
        assert_eq!(answer(&options), address.as_bytes());
        assert_eq!(answer(b"\xff\xff no message"), address.as_bytes());
        // 2.3 and later.
        let params = BootstrapParams {
            instance_id: "abc".into(),
            namespace: "k8s.io".into(),
            containerd_version: "2.3.0".into(),
            ..Default::default()
        };
        let response = answer(&params.write_to_bytes().unwrap());
        let result = BootstrapResult::parse_from_bytes(&response).unwrap();
        assert_eq!((result.version, &*result.address, &*result.protocol), (3, address, "ttrpc"));
    }
}
