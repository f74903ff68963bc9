//! `start`: finds or starts the shim that serves a task, and writes the start response.
//!
//! | containerd | standard input | what it reads |
//! |---|---|---|
//! | 1.6 | options of the runtime, or nothing | an address |
//! | 1.7 to 2.2 | the same | an address, or JSON |
//! | 2.3 and later | BootstrapParams (protobuf) | BootstrapResult (protobuf) |
//!
//! A plain address means version 2 of the task API, which all of them support. JSON with version 2 means
//! the same and is sent to a containerd that sets MAX_SHIM_VERSION (1.7 to 2.2): 1.7 refuses version 3,
//! and cannot be told from 2.0 here. Output on standard error would become part of the response.

use std::fs;
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use serde::Serialize;

use crate::args::Arguments;
use crate::cleanup;
use crate::paths::PodPaths;
use crate::settings::Settings;
use crate::spec::{self, ContainerType};

/// Maximum size of standard input, bytes.
const MAX_INPUT: u64 = 1 << 20;
/// Task API version in a BootstrapResult.
const VERSION: i32 = 3;
/// Task API version in a JSON response: containerd 1.7 refuses a greater one.
const JSON_VERSION: i32 = 2;
const PROTOCOL: &str = "ttrpc";
/// Environment variable that containerd sets from 1.7 on, always to 2.
const MAX_SHIM_VERSION: &str = "MAX_SHIM_VERSION";
/// Time for the shim of a former pod with the same id to exit, or for its cleanup to end.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for the cleanup of a former pod with the same id that `start` itself begins.
const FORMER_POD_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for a shim that is being started to accept connections.
const START_TIMEOUT: Duration = Duration::from_secs(2);

pub(crate) fn start(arguments: &Arguments) -> Result<()> {
    let mut input = Vec::new();
    if !std::io::stdin().is_terminal() {
        std::io::stdin().take(MAX_INPUT).read_to_end(&mut input).context("reading the options")?;
    }
    let bundle = arguments.bundle()?;
    let container_type =
        spec::read_if_present(&bundle)?.map(|spec| spec::container_type(&spec)).transpose()?;
    let pod = match container_type {
        Some(ContainerType::PodContainer { pod }) if pod != arguments.id => Some(pod),
        _ => None,
    };
    let settings = Settings::of_task(&bundle, pod.as_deref())?;
    settings.save(&bundle)?;
    let paths =
        PodPaths::new(&settings, &arguments.namespace, pod.as_ref().unwrap_or(&arguments.id));
    match pod {
        Some(pod) => {
            if !wait_until_alive(&paths) {
                bail!("pod {pod} of container {} has no running shim", arguments.id);
            }
        }
        None if paths.is_alive() => {}
        None => spawn_shim(arguments, &settings, &bundle, &paths)?,
    }
    let address = paths.address();
    // containerd reconnects to its shims by this file after a restart.
    fs::write(bundle.join("address"), &address).context("writing the address")?;
    let mut output = std::io::stdout();
    let reads_json = std::env::var_os(MAX_SHIM_VERSION).is_some();
    output.write_all(&encode_response(&input, arguments, address, reads_json)?)?;
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

/// The start response in JSON (containerd's client.BootstrapParams).
#[derive(Serialize)]
struct JsonResponse {
    version: i32,
    address: String,
    protocol: &'static str,
}

/// Encodes the start response for the calling containerd version.
fn encode_response(
    input: &[u8],
    arguments: &Arguments,
    address: String,
    reads_json: bool,
) -> Result<Vec<u8>> {
    // The `Any` with runtime options of an older containerd parses as BootstrapParams as well.
    let speaks_bootstrap = BootstrapParams::parse_from_bytes(input).is_ok_and(|params| {
        params.instance_id == arguments.id && params.namespace == arguments.namespace
    });
    if speaks_bootstrap {
        let protocol = PROTOCOL.to_owned();
        let result = BootstrapResult { version: VERSION, address, protocol, ..Default::default() };
        return Ok(result.write_to_bytes()?);
    }
    if reads_json {
        let version = JSON_VERSION;
        return Ok(serde_json::to_vec(&JsonResponse { version, address, protocol: PROTOCOL })?);
    }
    Ok(address.into_bytes())
}

/// Creates the socket and starts the shim with it.
fn spawn_shim(
    arguments: &Arguments,
    settings: &Settings,
    bundle: &Path,
    paths: &PodPaths,
) -> Result<()> {
    let lock = loop {
        let lock = paths.create_and_lock(LOCK_TIMEOUT)?;
        if !paths.root.join("pods").exists() {
            break lock;
        }
        // Of a pod with the same id, whose shim died with the host. The cleanup takes the lock.
        drop(lock);
        let former = settings.of_former_pod(&paths.key);
        ensure!(
            cleanup::run(&former, &paths.key, FORMER_POD_TIMEOUT)?,
            "removing the former pod with this id ({}) takes longer than {FORMER_POD_TIMEOUT:?}; it continues",
            paths.root.display()
        );
    };
    settings.write(&paths.settings())?;
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
        // The shim holds the lock as long as it lives.
        .stdout(Stdio::from(OwnedFd::from(lock)))
        .stderr(Stdio::null())
        // A process group of its own: signals to containerd's group must not reach it.
        .process_group(0);
    let shim = command.spawn().context("starting the shim")?;
    // Before the response: `delete`, which may follow at once, has to find the process.
    paths.write_pid(shim.id()).context("writing the shim's pid")
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    use super::*;

    fn arguments() -> Arguments {
        let args = ["-namespace", "k8s.io", "-id", "abc", "start"].map(str::to_owned);
        Arguments::parse(&args).unwrap()
    }

    const ADDRESS: &str = "unix:///run/nacelle-shim/x/shim.sock";

    fn response(input: &[u8], reads_json: bool) -> Vec<u8> {
        encode_response(input, &arguments(), ADDRESS.to_owned(), reads_json).unwrap()
    }

    /// Runtime options, as containerd up to 2.2 sends them.
    fn options() -> Vec<u8> {
        let options = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: b"\x0a\x01x".to_vec(),
            ..Default::default()
        };
        options.write_to_bytes().unwrap()
    }

    #[test]
    fn containerd_1_6_gets_a_plain_address() {
        assert!(BootstrapParams::parse_from_bytes(&options()).is_ok(), "it must not be mistaken");
        for input in [&b""[..], &options(), b"\xff\xff no message"] {
            assert_eq!(response(input, false), ADDRESS.as_bytes());
        }
    }

    #[test]
    fn containerd_1_7_to_2_2_get_json_of_version_2() {
        for input in [&b""[..], &options()] {
            let json: serde_json::Value = serde_json::from_slice(&response(input, true)).unwrap();
            let expected =
                serde_json::json!({ "version": 2, "address": ADDRESS, "protocol": "ttrpc" });
            assert_eq!(json, expected);
        }
    }

    #[test]
    fn containerd_2_3_gets_a_bootstrap_result() {
        let mut params = BootstrapParams {
            instance_id: "abc".into(),
            namespace: "k8s.io".into(),
            containerd_version: "2.3.0".into(),
            ..Default::default()
        };
        let response_to = |params: &BootstrapParams| {
            // It sets MAX_SHIM_VERSION, too.
            response(&params.write_to_bytes().unwrap(), true)
        };
        let result = BootstrapResult::parse_from_bytes(&response_to(&params)).unwrap();
        assert_eq!((result.version, &*result.address, &*result.protocol), (3, ADDRESS, "ttrpc"));
        // Another task's parameters are not ours.
        params.instance_id = "other".into();
        assert_eq!(response_to(&params)[0], b'{');
    }
}
