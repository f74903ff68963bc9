//! Exit status of a child.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    Exited(i32),
    Signaled(i32),
}

impl ExitStatus {
    /// Whether SIGKILL ended it, as the OOM killer does.
    pub fn is_sigkill(self) -> bool {
        self == Self::Signaled(libc::SIGKILL)
    }
}
