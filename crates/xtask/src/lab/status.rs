//! Exit statuses of the lab that are not the command's.

/// Exit status when the lab, not the command in it, failed (as `env` and `docker run` use it).
pub(crate) const STATUS_LAB_FAILED: i32 = 125;
/// Exit status when the command ran into its limit, as timeout(1) has it.
pub(crate) const STATUS_TIMEOUT: i32 = 124;

/// Exit status after SIGINT or SIGTERM, as a shell has it.
pub(crate) const STATUS_INTERRUPTED: i32 = 130;
