//! `start`: who serves a task, and how containerd is told.
//!
//! | containerd | standard input | what it reads |
//! |---|---|---|
//! | 1.6 | options of the runtime, or nothing | an address |
//! | 1.7 to 2.2 | the same | an address, or JSON |
//! | 2.3 and later | BootstrapParams (protobuf) | BootstrapResult (protobuf) |
//!
//! An address alone stands for version 2 of the task API, which all of them speak. What goes to
//! standard error would be taken for part of the answer.

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
use crate::place::Place;
use crate::settings::Settings;
use crate::spec::{self, Role};

/// What containerd may send, bytes.
const MAX_INPUT: u64 = 1 << 20;
/// Task API of the answer in protobuf.
const VERSION: i32 = 3;
/// A shim that is just being started answers within this time.
const ALIVE_LIMIT: Duration = Duration::from_secs(2);

pub(crate) fn start(arguments: &Arguments) -> Result<()> {
    let mut input = Vec::new();
    if !std::io::stdin().is_terminal() {
        std::io::stdin().take(MAX_INPUT).read_to_end(&mut input).context("reading the options")?;
    }
    let settings = Settings::load()?;
    let bundle = arguments.bundle()?;
    let pod = match spec::role(&spec::read(&bundle)?)? {
        Role::Member { pod } if pod != arguments.id => Some(pod),
        _ => None,
    };
    let place = Place::new(&settings, &arguments.namespace, pod.as_ref().unwrap_or(&arguments.id));
    match pod {
        Some(pod) => {
            if !is_alive_soon(&place) {
                bail!("pod {pod} of container {} has no shim that runs", arguments.id);
            }
        }
        None if place.is_alive() => {}
        None => launch(arguments, &bundle, &place)?,
    }
    let address = place.address();
    // containerd finds its shims by it after a restart.
    fs::write(bundle.join("address"), &address).context("writing the address")?;
    let mut output = std::io::stdout();
    output.write_all(&answer(&input, arguments, address)?)?;
    output.flush()?;
    Ok(())
}

fn is_alive_soon(place: &Place) -> bool {
    let until = std::time::Instant::now() + ALIVE_LIMIT;
    while !place.is_alive() {
        if std::time::Instant::now() > until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// In the form that the caller understands.
fn answer(input: &[u8], arguments: &Arguments, address: String) -> Result<Vec<u8>> {
    // Options of an old daemon are a message with a string and bytes, which can be read as these too.
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

/// Makes the socket and starts the shim with it.
fn launch(arguments: &Arguments, bundle: &Path, place: &Place) -> Result<()> {
    place.make()?;
    let path = place.socket();
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
        .args(arguments.to_serve())
        .current_dir(bundle)
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Not of containerd's group, whose signals are for containerd.
        .process_group(0);
    command.spawn().context("starting the shim")?;
    Ok(())
}

/// `-info`: the options come in, what this runtime is goes out.
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
        let words = ["-namespace", "k8s.io", "-id", "abc", "start"].map(str::to_owned);
        Arguments::parse(&words).unwrap()
    }

    #[test]
    fn each_containerd_gets_the_answer_that_it_understands() {
        let address = "unix:///run/nacelle-shim/x/shim.sock";
        let answer = |input: &[u8]| answer(input, &arguments(), address.to_owned()).unwrap();
        // 1.6 and 1.7 without options.
        assert_eq!(answer(b""), address.as_bytes());
        // Up to 2.2 with options, which parse as parameters as well.
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
        let told = answer(&params.write_to_bytes().unwrap());
        let told = BootstrapResult::parse_from_bytes(&told).unwrap();
        assert_eq!((told.version, &*told.address, &*told.protocol), (3, address, "ttrpc"));
    }
}
