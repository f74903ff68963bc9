//! Waits for OOM kills: `memory.events` of each container's cgroup raises an inotify event when a counter
//! in it changes (kernel Documentation/admin-guide/cgroup-v2.rst).

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::error::{Context, Result};
use crate::oci::cgroup::Cgroup;
use crate::stdio::{Channel, channel};

#[derive(Debug)]
pub struct Watch {
    inotify: Inotify,
    /// The same descriptor, registered with tokio.
    channel: Channel,
    containers: Mutex<HashMap<WatchDescriptor, String>>,
}

impl Watch {
    pub fn new() -> Result<Self> {
        let what = || "watch for OOM kills".to_owned();
        let inotify =
            Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).context(what)?;
        let fd = inotify.as_fd().try_clone_to_owned().context(what)?;
        let channel = channel(fd).context(what)?;
        Ok(Self { inotify, channel, containers: Mutex::default() })
    }

    /// Watches a cgroup. The kernel drops the watch together with the cgroup.
    pub fn add(&self, container: &str, cgroup: &Cgroup) {
        let path = cgroup.dir().join("memory.events");
        match self.inotify.add_watch(&path, AddWatchFlags::IN_MODIFY) {
            Ok(watch) => {
                let mut all = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
                all.insert(watch, container.to_owned());
            }
            // Without the memory controller there is no limit and no OOM kill.
            Err(error) => tracing::info!(container, %error, "OOM kills are not watched"),
        }
    }

    /// Waits for containers whose counters may have changed.
    pub async fn next(&self) -> std::io::Result<Vec<String>> {
        let mut ready = self.channel.readable().await?;
        let mut names = Vec::new();
        match self.inotify.read_events() {
            Ok(events) => {
                let mut all = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
                for event in events {
                    if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                        all.remove(&event.wd);
                    } else {
                        names.extend(all.get(&event.wd).cloned());
                    }
                }
            }
            Err(Errno::EAGAIN) => ready.clear_ready(),
            Err(error) => return Err(error.into()),
        }
        Ok(names)
    }
}
