//! The agent's event loop: one thread with the reaper, the listeners and the gRPC server.

use std::sync::Arc;
use std::time::Duration;

use agent_api::MAX_MESSAGE;
use agent_api::v1::agent_server::AgentServer;

use crate::agent::{Agent, Config};
use crate::error::{Context, Result};
use crate::listen::Listener;
use crate::service::AgentService;
use crate::{containers, guest, host_namespaces, reaper};

/// Directory of all files and mounts of the agent.
pub const BASE: &str = "/run/nacelle";
/// Maximum threads of tokio's blocking pool. They never touch a file system of a container;
/// `blocking` does that.
const BLOCKING_THREADS: usize = 4;

/// Sockets on which the host connects.
pub struct Listeners {
    pub control: Listener,
    pub stdio: Listener,
    pub forward: Listener,
}

/// Serves the host on the sockets that `listen` opens; they are opened when requests can be served.
pub fn serve(config: Config, listen: impl FnOnce() -> Result<Listeners>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .context(|| "create the tokio runtime".to_owned())?;
    runtime.block_on(async {
        let sigchld = reaper::watch().context(|| "watch for SIGCHLD".to_owned())?;
        let agent = Agent::new(config)?;
        let shm = agent.config.base.join("shm");
        match &agent.config.host {
            Some(host) if host.ipc => host_namespaces::share_shm(&shm)?,
            _ => guest::shm::set_up(&shm, 0)?,
        }
        let Listeners { control, stdio, forward } = listen()?;
        tokio::spawn(reaper::run(sigchld, Arc::clone(&agent)));
        tokio::spawn(containers::oom::run(Arc::clone(&agent)));
        tokio::spawn(crate::stdio::serve::run(stdio, Arc::clone(&agent)));
        tokio::spawn(crate::forward::run(forward));
        let service = AgentServer::new(AgentService::new(agent))
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        tonic::transport::Server::builder()
            .serve_with_incoming(service, control.incoming())
            .await
            .map_err(std::io::Error::other)
            .context(|| "run the gRPC server".to_owned())
    })
}
