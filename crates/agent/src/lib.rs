//! nacelle-agent: PID 1 of a pod's guest.
//!
//! ```text
//!  host --vsock 1024, gRPC--> service --> containers --> oci --helper process--> container's init
//!       --vsock 1025, bytes-> stdio  <---------------------pipes, terminals--------------'
//!       --vsock 1026, bytes-> forward --TCP--> 127.0.0.1, ::1
//!                              guest: boot, devices, network, identity, volumes, power-off
//! ```
//! One thread serves everything; it waits for sockets, pidfds and timers only. What may block on a
//! file system runs on short-lived threads with a deadline (`lanes`).
//! It is the only user space of the guest: no distribution, no shell, no configuration. A pod that
//! has the host's namespaces has no guest; its agent runs on the host (`host_pod`).
//!
//! Has never heard of KVM, CRI, images or pods other than its own.

mod agent;
mod containers;
mod error;
mod events;
mod forward;
mod guest;
mod host_pod;
mod ids;
mod lanes;
mod listen;
mod log;
mod oci;
mod panics;
mod reaper;
mod sealed;
mod service;
mod stdio;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_api::v1::agent_server::AgentServer;
use agent_api::{CONTROL_PORT, FORWARD_PORT, MAX_MESSAGE, STDIO_PORT};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use agent::{Agent, Config};
use error::{Doing, Result};
use listen::Listener;

/// Where everything of the agent is.
const BASE: &str = "/run/nacelle";
/// Threads for calls that block in the kernel, but on no file system of a container (`lanes`).
const BLOCKING_THREADS: usize = 4;

/// Never returns in a guest: PID 1's end is the kernel's.
pub fn main() {
    panics::abort();
    oci::helper::main_if_helper();
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["--version"] => println!("nacelle-agent {}", env!("CARGO_PKG_VERSION")),
        ["--listen-unix", folder] => match on_a_development_machine(Path::new(folder)) {
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
        // The kernel hands words of its command line that it does not know to PID 1.
        _ if std::process::id() == 1 => in_a_guest(),
        _ => {
            eprintln!(
                "nacelle-agent is the first process of a nacelle guest.\n\
                 For tests, in namespaces of its own: unshare -mpuiC --fork --mount-proc \
                 nacelle-agent --listen-unix FOLDER"
            );
            std::process::exit(2);
        }
    }
}

fn in_a_guest() -> ! {
    panics::this_is_a_guest();
    let errors = guest::boot::run();
    for error in &errors {
        tracing::error!(error = %error.chain(), "boot");
    }
    loop {
        let config = Config {
            base: PathBuf::from(BASE),
            cgroup: "pod".to_owned(),
            folders_as_disks: false,
            host: None,
            share: guest::share::Source::Device,
            scratch: guest::scratch::Source::Device,
            is_guest: true,
        };
        let result = block_on(config, || {
            let listen =
                |port| Listener::vsock(port).doing(|| format!("listen on vsock port {port}"));
            Ok(Doors {
                control: listen(CONTROL_PORT)?,
                stdio: listen(STDIO_PORT)?,
                forward: listen(FORWARD_PORT)?,
            })
        });
        // The host sees that nobody answers and finds the reason on the console.
        match result {
            Ok(()) => tracing::error!("the server has ended"),
            Err(error) => tracing::error!(error = %error.chain(), "cannot serve"),
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Serves on Unix sockets `control.sock`, `stdio.sock` and `forward.sock` in `folder`. Wants mount, PID, UTS, IPC
/// and cgroup namespaces of its own, and cgroup v2 at its usual place.
fn on_a_development_machine(folder: &Path) -> Result<()> {
    log::install(std::env::var("NACELLE_LOG").ok().as_deref());
    let base = Path::new(BASE);
    std::fs::create_dir_all(base).doing(|| format!("make {BASE}"))?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        .doing(|| "leave the machine's mounts alone".to_owned())?;
    mount(Some("nacelle"), base, Some("tmpfs"), MsFlags::empty(), None::<&str>)
        .doing(|| format!("mount {BASE}"))?;
    // A machine with cgroup v1 there has room for v2 in this mount namespace.
    let _ = umount2(oci::cgroup::MOUNT, MntFlags::MNT_DETACH);
    mount(Some("cgroup2"), oci::cgroup::MOUNT, Some("cgroup2"), MsFlags::empty(), None::<&str>)
        .doing(|| "mount cgroup v2".to_owned())?;
    // Up already in the machine's own network namespace.
    guest::network::loopback_up()?;
    let config = Config {
        base: base.to_owned(),
        // Several agents may be tested at once.
        cgroup: match folder.file_name().and_then(|name| name.to_str()) {
            Some(name) => format!("nacelle-agent-{}", name.trim_start_matches('.')),
            None => "nacelle-agent-test".to_owned(),
        },
        folders_as_disks: true,
        host: None,
        share: guest::share::Source::Folder(folder.join("shares")),
        scratch: guest::scratch::Source::Folder(folder.join("scratch")),
        is_guest: false,
    };
    block_on(config, || {
        let listen = |name: &str| {
            let path = folder.join(name);
            Listener::unix(&path).doing(|| format!("listen on {}", path.display()))
        };
        Ok(Doors {
            stdio: listen("stdio.sock")?,
            forward: listen("forward.sock")?,
            // The last one: who sees it may use the others.
            control: listen("control.sock")?,
        })
    })
}

/// Where the host comes in.
struct Doors {
    control: Listener,
    stdio: Listener,
    forward: Listener,
}

fn block_on(config: Config, listen: impl FnOnce() -> Result<Doors>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .doing(|| "start the event loop".to_owned())?;
    runtime.block_on(async {
        let ended = reaper::children().doing(|| "watch for ended children".to_owned())?;
        let agent = Agent::new(config)?;
        let shm = agent.config.base.join("shm");
        match &agent.config.host {
            Some(host) if host.ipc => host_pod::share_shm(&shm)?,
            _ => guest::shm::set_up(&shm, 0)?,
        }
        let Doors { control, stdio, forward } = listen()?;
        tokio::spawn(reaper::run(ended, Arc::clone(&agent)));
        tokio::spawn(containers::oom::run(Arc::clone(&agent)));
        tokio::spawn(stdio::serve::run(stdio, Arc::clone(&agent)));
        tokio::spawn(forward::run(forward));
        let service = AgentServer::new(service::AgentService::new(agent))
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        tonic::transport::Server::builder()
            .serve_with_incoming(service, control.incoming())
            .await
            .map_err(std::io::Error::other)
            .doing(|| "serve".to_owned())
    })
}
