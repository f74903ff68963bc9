//! One pod: an owner task that alone changes its state, jobs that do the work, and a handle for
//! everything else.
//!
//! ```text
//! API ──Request──> owner ──spawns──> job ──Commit(changes)──> owner ──> journal ──> watch
//!                    ^                                                               │
//!  watchers (VMM's end, guest's events, pings) ──Commit──┘        listings, jobs <───┘
//! ```

mod configure_guest;
mod cpuset;
mod create_container;
mod disks;
mod empty_dirs;
mod event_tracker;
mod events;
mod exit_cause;
mod file_server;
mod handle;
mod host_pod;
mod log_tail;
mod memory;
mod message;
mod oom_score;
mod owner;
mod recover;
mod remove_container;
mod remove_pod;
mod run_pod;
mod save_template;
mod share_plan;
mod shares;
mod start_container;
mod stats;
mod stop_container;
mod stop_pod;
mod sync;
mod trace;
mod undo;
mod update_container;
mod update_pod;
mod vm_program;
mod volume_ids;
mod volumes;
mod watch;
mod write_back;

pub(crate) use create_container::new_container;
pub(crate) use handle::{ExecExit, Handle};
pub(crate) use message::Request;
pub(crate) use owner::{InitialAction, new};
pub(crate) use stop_container::stop_container;
