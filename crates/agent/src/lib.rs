//! nacelle-agent: PID 1 of a pod's VM. It creates containers from OCI specs and serves the host
//! over gRPC and stream sockets.
//!
//! ```text
//!  host --vsock 1024, gRPC--> service --> containers --> oci --helper process--> container's init
//!       --vsock 1025, bytes-> stdio  <---------------------pipes, terminals--------------'
//!       --vsock 1026, bytes-> forward --TCP--> 127.0.0.1, ::1
//!                              guest: boot, devices, network, identity, volumes, power-off
//! ```
//! One thread runs the event loop; it waits for sockets, pidfds and timers only. Calls that may
//! block on a file system run on short-lived threads with a deadline (`blocking`). The agent is the
//! only program of the initramfs: no distribution, no shell, no configuration files. The agent of a
//! pod with host namespaces runs on the host, without a VM (`host_pod`).
//!
//! Knows nothing of KVM, CRI, image formats or other pods.

mod agent;
mod blocking;
mod containers;
mod error;
mod events;
mod exit_status;
mod forward;
mod guest;
mod host_namespaces;
mod host_pod;
mod ids;
mod listen;
mod log;
mod oci;
mod panics;
mod reaper;
mod sealed;
mod serve;
mod service;
mod stdio;

use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_api::{CONTROL_PORT, FORWARD_PORT, STDIO_PORT};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use agent::Config;
use error::{Context, Result};
use listen::Listener;
use serve::{BASE, Listeners, serve};

/// Entry point. As PID 1 it never returns, as the end of PID 1 is a kernel panic.
pub fn main() {
    panics::abort();
    oci::dispatch::main_if_helper();
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["--version"] => println!("nacelle-agent {}", env!("CARGO_PKG_VERSION")),
        ["--listen-unix", dir] => match run_for_tests(Path::new(dir)) {
            Ok(()) => {}
            Err(error) => {
                eprintln!("nacelle-agent: {}", error.chain());
                std::process::exit(1);
            }
        },
        [agent_api::host_pod::FLAG, ..] => {
            let error = match host_pod::run(&args) {
                Ok(()) => "the server has ended".to_owned(),
                Err(error) => error.chain(),
            };
            eprintln!("nacelle-agent: {error}");
            std::process::exit(1);
        }
        // The kernel passes unknown words of its command line as arguments to PID 1.
        _ if std::process::id() == 1 => run_in_guest(),
        _ => {
            eprintln!(
                "nacelle-agent is the init process of a nacelle guest.\n\
                 For tests, in separate namespaces: unshare -mpuiC --fork --mount-proc \
                 nacelle-agent --listen-unix DIR"
            );
            std::process::exit(2);
        }
    }
}

fn run_in_guest() -> ! {
    panics::set_in_guest();
    let errors = guest::boot::run();
    for error in &errors {
        tracing::error!(error = %error.chain(), "boot");
    }
    loop {
        let config = Config {
            base: PathBuf::from(BASE),
            cgroup: "pod".to_owned(),
            dirs_as_disks: false,
            host: None,
            share: guest::share::Source::Device,
            scratch: guest::scratch::Source::Device,
            is_guest: true,
        };
        let result = serve(config, || {
            let listen =
                |port| Listener::vsock(port).context(|| format!("listen on vsock port {port}"));
            Ok(Listeners {
                control: listen(CONTROL_PORT)?,
                stdio: listen(STDIO_PORT)?,
                forward: listen(FORWARD_PORT)?,
            })
        });
        // The host notices the missing listener and reads the reason on the console.
        match result {
            Ok(()) => tracing::error!("the server has ended"),
            Err(error) => tracing::error!(error = %error.chain(), "cannot serve"),
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Serves on the Unix sockets `control.sock`, `stdio.sock` and `forward.sock` in `dir`. Needs
/// mount, PID, UTS, IPC and cgroup namespaces of its own, and cgroup v2 at `/sys/fs/cgroup`.
fn run_for_tests(dir: &Path) -> Result<()> {
    log::install(std::env::var("NACELLE_LOG").ok().as_deref());
    let base = Path::new(BASE);
    std::fs::create_dir_all(base).context(|| format!("make {BASE}"))?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        .context(|| "make the mounts private".to_owned())?;
    mount(Some("nacelle"), base, Some("tmpfs"), MsFlags::empty(), None::<&str>)
        .context(|| format!("mount {BASE}"))?;
    // On a host with cgroup v1 the mount point is freed for v2 in this mount namespace.
    let _ = umount2(oci::cgroup::MOUNT, MntFlags::MNT_DETACH);
    mount(Some("cgroup2"), oci::cgroup::MOUNT, Some("cgroup2"), MsFlags::empty(), None::<&str>)
        .context(|| "mount cgroup v2".to_owned())?;
    // Already up if the network namespace is the host's.
    guest::network::loopback_up()?;
    let config = Config {
        base: base.to_owned(),
        // Several test agents may run at once.
        cgroup: match dir.file_name().and_then(|name| name.to_str()) {
            Some(name) => format!("nacelle-agent-{}", name.trim_start_matches('.')),
            None => "nacelle-agent-test".to_owned(),
        },
        dirs_as_disks: true,
        host: None,
        share: guest::share::Source::Directory(dir.join("shares")),
        scratch: guest::scratch::Source::Directory(dir.join("scratch")),
        is_guest: false,
    };
    serve(config, || {
        let listen = |name: &str| {
            let path = dir.join(name);
            Listener::unix(&path).context(|| format!("listen on {}", path.display()))
        };
        Ok(Listeners {
            stdio: listen("stdio.sock")?,
            forward: listen("forward.sock")?,
            // Last: a client that sees this socket may use the others.
            control: listen("control.sock")?,
        })
    })
}
