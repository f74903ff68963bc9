//! Starts and stops the parts of the daemon in order.

use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use image::Images;
use sandbox::Sandboxes;
use sandbox::launcher::LauncherProcess;
use sandbox::ports::Network;
use tokio::signal::unix::{SignalKind, signal};
use tonic::service::Routes;

use super::debug::Debug;
use super::health::NodeHealth;
use super::images::Keeper;
use super::metrics::{self, Counters};
use super::network::CniNetwork;
use super::{logging, notify};
use crate::api::debug_server::DebugServer;
use crate::settings::Settings;

/// Time for pending requests to end at shutdown; pods do not depend on it.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);

pub(super) fn serve(settings: Settings) -> Result<()> {
    logging::start(&settings.log)?;
    for folder in [&settings.root, &settings.state] {
        // Only root may list images, logs and control sockets. The users of VMMs reach their own
        // files by descriptors, and by paths that they may traverse.
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(folder)
            .with_context(|| format!("creating {}", folder.display()))?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("nacelled")
        .build()
        .context("starting threads")?;
    let outcome = runtime.block_on(work(settings));
    // Blocking work that hangs (a plugin, a failed disk) must not prevent the exit.
    runtime.shutdown_timeout(Duration::from_secs(2));
    outcome
}

async fn work(settings: Settings) -> Result<()> {
    // First, because it fails if another daemon has the socket.
    let listener = cri::listen(&settings.socket)?;
    let counters = Arc::new(Counters::new());
    let cni = ::network::Cni::observed(settings.network.clone(), counters.clone());
    let network: Arc<dyn Network> = Arc::new(CniNetwork(cni));
    let images = Images::open_observed(settings.images.clone(), counters.clone())
        .await
        .context("opening the image store")?;
    let launcher = Arc::new(
        LauncherProcess::start(settings.pods.launcher.clone()).context("starting the launcher")?,
    );
    let pods = settings.pods.clone();
    let sandboxes = Sandboxes::open_observed(pods, network.clone(), launcher, counters.clone())
        .await
        .context("opening the journal of pods")?;
    let listen = &settings.metrics.listen;
    let scraped = sandboxes.clone();
    let metrics_server = metrics::Server::start(listen, || {
        metrics::registry(&counters, metrics::Node::new(scraped))
    });
    // Any process of the host can occupy a port: pods must run without metrics.
    let _metrics_server = match metrics_server.await {
        Ok(server) => server,
        Err(error) => {
            let error = format!("{error:#}");
            tracing::error!(%listen, error, "metrics are not served until nacelled is restarted");
            None
        }
    };
    let health = Arc::new(NodeHealth::watch(&settings, network));
    let debug = Debug::new(sandboxes.clone(), images.clone(), health.clone());
    let streams = cri::bind_streams(&settings.streaming, sandboxes.clone())
        .context("starting the streaming server")?;
    tracing::info!(url = streams.base_url(), "streaming server started");
    let runtime = cri::Runtime::new(
        sandboxes.clone(),
        images.clone(),
        health,
        settings.cri.clone(),
        settings.root.clone(),
        streams,
    );
    Keeper::start(sandboxes.clone(), images.clone()).await.context("deleting unused images")?;
    let service = cri::Image::new(images, sandboxes.clone(), &settings.cri);
    let debug_routes = Routes::new(
        DebugServer::new(debug)
            .max_decoding_message_size(cri::MAX_MESSAGE)
            .max_encoding_message_size(cri::MAX_MESSAGE),
    );

    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut stop_requested = stopped.clone();
    let shutdown: cri::Shutdown = Box::pin(async move {
        let _ = stop_requested.wait_for(|stop| *stop).await;
    });
    let mut server = tokio::spawn(cri::serve(
        listener,
        runtime,
        service,
        debug_routes,
        Some(counters),
        shutdown,
    ));
    notify::send("READY=1");
    tracing::info!(
        socket = %settings.socket.display(),
        root = %settings.root.display(),
        pods = sandboxes.pods(&sandbox::model::Filter::default()).len(),
        version = env!("CARGO_PKG_VERSION"),
        "nacelled is ready"
    );

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let ended = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        outcome = &mut server => Some(outcome),
    };
    notify::send("STOPPING=1");
    let outcome = match ended {
        Some(outcome) => outcome,
        None => {
            tracing::info!("nacelled is stopping; pods keep running");
            let _ = stop.send(true);
            match tokio::time::timeout(SHUTDOWN_LIMIT, &mut server).await {
                Ok(outcome) => outcome,
                // A call that follows a console does not end by itself.
                Err(_) => {
                    server.abort();
                    Ok(Ok(()))
                }
            }
        }
    };
    sandboxes.shutdown().await;
    let _ = std::fs::remove_file(&settings.socket);
    outcome.context("the server panicked")?.context("serving")
}
