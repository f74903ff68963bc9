//! The serving shim: serves the task API and the Sandbox service on the socket that `start` created, until
//! Shutdown.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim::shim_ttrpc_async::create_task;
use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;
use containerd_shim_protos::ttrpc::asynchronous::{Server, Service};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::args::Arguments;
use crate::cleanup;
use crate::events::Publisher;
use crate::paths::PodPaths;
use crate::pod::Pod;
use crate::sandbox_service::SandboxService;
use crate::service::TaskService;
use crate::settings::Settings;

/// Environment variable with the address of containerd's ttrpc server, which receives events.
const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// Both names of the task service: version 3 is version 2 renamed.
const SERVICE_V2: &str = "containerd.task.v2.Task";
const SERVICE_V3: &str = "containerd.task.v3.Task";

pub(crate) fn serve(arguments: &Arguments) -> Result<()> {
    let lock = take_lock()?;
    // The working directory is the bundle.
    let settings = Settings::of_task(&arguments.bundle()?, None)?;
    start_log(arguments, &settings);
    let paths = PodPaths::new(&settings, &arguments.namespace, &arguments.id);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let served = runtime.block_on(run(arguments, settings, paths));
    drop(lock);
    // A hanging blocking task must not prevent the exit.
    runtime.shutdown_background();
    if let Err(error) = &served {
        tracing::error!(error = format!("{error:#}"), "the shim failed");
    }
    served
}

/// `start` passes the lock of the pod's root directory as standard output. It is held until the shim
/// exits, and must not be inherited by other processes.
fn take_lock() -> Result<OwnedFd> {
    let lock = std::io::stdout().as_fd().try_clone_to_owned().context("taking the lock")?;
    let null = File::options().write(true).open("/dev/null").context("opening /dev/null")?;
    nix::unistd::dup2_stdout(null).context("replacing standard output")?;
    Ok(lock)
}

/// The listening socket is passed as standard input.
fn listener() -> Result<UnixListener> {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().context("taking the socket")?;
    let listener = UnixListener::from(socket);
    listener.local_addr().context("standard input is not the socket of `start`")?;
    Ok(listener)
}

async fn run(arguments: &Arguments, settings: Settings, paths: PodPaths) -> Result<()> {
    let listener = listener()?;
    listener.set_nonblocking(true)?;
    paths.write_pid(std::process::id()).context("writing the pid")?;
    let publisher = Publisher::start(arguments.namespace.clone(), events_address(arguments));
    let pod = Pod::new(arguments.namespace.clone(), paths, settings, publisher.clone());
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let mut server =
        Server::new().add_listener(Listener::from(listener)).register_service(services(&pod));
    server.start().await.context("serving")?;
    tracing::info!(id = arguments.id, namespace = arguments.namespace, "shim serves");
    // Not in `start`, whose end containerd awaits.
    let settings = pod.settings.clone();
    tokio::task::spawn_blocking(move || cleanup::sweep(&settings));
    // A signal sent to a process group must not stop the pod.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    loop {
        tokio::select! {
            () = pod.shutdown.cancelled() => break,
            _ = terminate.recv() => tracing::info!("SIGTERM is ignored: containerd stops a shim with Shutdown"),
            _ = interrupt.recv() => {}
        }
    }
    publisher.flush().await;
    pod.destroy().await;
    let _ = server.shutdown().await;
    Ok(())
}

/// The task service under both names, and the Sandbox service.
pub(crate) fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let make = || create_task(Arc::new(TaskService(pod.clone())));
    let mut all = create_sandbox(Arc::new(SandboxService(pod.clone())));
    for name in [SERVICE_V2, SERVICE_V3] {
        all.extend(make().remove(SERVICE_V3).map(|service| (name.to_owned(), service)));
    }
    all
}

fn events_address(arguments: &Arguments) -> String {
    let given = std::env::var(TTRPC_ADDRESS).ok().filter(|address| !address.is_empty());
    let address = given.unwrap_or_else(|| format!("{}.ttrpc", arguments.address));
    if address.contains("://") { address } else { format!("unix://{address}") }
}

/// Logs to the FIFO `log` in the bundle (the working directory), which containerd reads. Open for
/// reading too, so that writes do not fail while containerd is down; a full FIFO drops lines.
fn start_log(arguments: &Arguments, settings: &Settings) {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let Ok(log) = options.open("log") else { return };
    let level = if arguments.debug { "debug" } else { settings.log_level.as_str() };
    let filter = EnvFilter::try_new(level).unwrap_or_else(|_| EnvFilter::new("info"));
    let log = Mutex::new(NonBlockingWriter(log));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(log)
        .try_init();
}

struct NonBlockingWriter(File);

impl Write for NonBlockingWriter {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        // Fails if the FIFO is full.
        let _ = self.0.write(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
