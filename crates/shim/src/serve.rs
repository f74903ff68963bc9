//! The shim itself: serves the task API at the socket that `start` has made, until containerd shuts it
//! down.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use containerd_shim_protos::shim::shim_ttrpc_async::create_task;
use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;
use containerd_shim_protos::ttrpc::asynchronous::{Server, Service};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::args::Arguments;
use crate::events::Publisher;
use crate::place::Place;
use crate::pod::Pod;
use crate::service::TaskService;
use crate::settings::Settings;

/// containerd says where it takes events.
const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// The names of one service: version 3 is a renamed version 2.
const SERVICE_V2: &str = "containerd.task.v2.Task";
const SERVICE_V3: &str = "containerd.task.v3.Task";

pub(crate) fn serve(arguments: &Arguments) -> Result<()> {
    let settings = Settings::load()?;
    start_log(arguments, &settings);
    let place = Place::new(&settings, &arguments.namespace, &arguments.id);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let served = runtime.block_on(work(arguments, settings, place));
    // Blocking work that hangs must not keep us from ending.
    runtime.shutdown_background();
    if let Err(error) = &served {
        tracing::error!(error = format!("{error:#}"), "the shim fails");
    }
    served
}

/// As the shim's only descriptor beside the standard ones, its socket is standard input.
fn listener() -> Result<UnixListener> {
    use std::os::fd::AsFd;
    let socket = std::io::stdin().as_fd().try_clone_to_owned().context("taking the socket")?;
    let listener = UnixListener::from(socket);
    listener.local_addr().context("standard input is not the socket of `start`")?;
    Ok(listener)
}

async fn work(arguments: &Arguments, settings: Settings, place: Place) -> Result<()> {
    let listener = listener()?;
    listener.set_nonblocking(true)?;
    place.write_pid().context("writing the pid")?;
    let publisher = Publisher::start(arguments.namespace.clone(), events_address(arguments));
    let pod = Pod::new(arguments.namespace.clone(), place, settings, publisher.clone());
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let mut server =
        Server::new().add_listener(Listener::from(listener)).register_service(services(&pod));
    server.start().await.context("serving")?;
    tracing::info!(id = arguments.id, namespace = arguments.namespace, "shim serves");
    // The pod is not ended by a signal that was meant for a group of processes.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    loop {
        tokio::select! {
            () = pod.ending.cancelled() => break,
            _ = terminate.recv() => tracing::info!("SIGTERM is ignored: the pod needs its shim"),
            _ = interrupt.recv() => {}
        }
    }
    publisher.flush().await;
    pod.end().await;
    let _ = server.shutdown().await;
    Ok(())
}

/// The service under both of its names.
fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let make = || create_task(Arc::new(TaskService(pod.clone())));
    let mut all = HashMap::new();
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

/// containerd reads a FIFO `log` in the bundle, which is our working folder. Open for reading too, so
/// that a containerd which goes away breaks nothing; what it does not read is dropped.
fn start_log(arguments: &Arguments, settings: &Settings) {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let Ok(log) = options.open("log") else { return };
    let level = if arguments.debug { "debug" } else { settings.log_level.as_str() };
    let filter = EnvFilter::try_new(level).unwrap_or_else(|_| EnvFilter::new("info"));
    let log = Mutex::new(Lossy(log));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(log)
        .try_init();
}

struct Lossy(std::fs::File);

impl Write for Lossy {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        // A full FIFO: nobody reads.
        let _ = self.0.write(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
