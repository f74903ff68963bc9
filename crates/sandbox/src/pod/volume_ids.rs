//! Ids of volumes in the guest.

/// Id of the guest volume with the pod's /etc files.
pub(super) const ETC_VOLUME: &str = "etc";

/// Id of a container's n-th volume in the guest; the guest removes volumes with the container's id
/// as prefix together with it.
pub(super) fn volume_id(container: &str, n: usize) -> String {
    format!("{container}.{n}")
}
