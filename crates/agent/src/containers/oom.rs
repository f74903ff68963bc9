//! Reports OOM kills when they happen.

use std::sync::Arc;

use agent_api::v1;

pub use super::oom_watch::Watch;
use crate::agent::Agent;

/// Pushes an event for each OOM kill; never returns unless inotify fails.
pub async fn run(agent: Arc<Agent>) {
    loop {
        let names = match agent.oom.next().await {
            Ok(names) => names,
            Err(error) => {
                tracing::error!(%error, "OOM kills are reported with exits only");
                return;
            }
        };
        let mut state = agent.lock();
        for name in names {
            let Ok(container) = state.container_mut(&name) else { continue };
            if let Some(oom) = container.take_oom(&name) {
                state.events.push(v1::event::Event::Oom(oom));
            }
        }
        drop(state);
        agent.events_changed.notify_waiters();
    }
}
