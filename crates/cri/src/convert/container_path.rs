//! Paths in a container, as requests name them.

use std::path::{Component, Path, PathBuf};

use super::Refusal;

/// Absolute, and without a way up: the guest resolves it inside the container's root.
pub fn container_path(path: &str) -> Result<String, Refusal> {
    // Kubernetes takes a relative path as one from the root.
    let absolute = Path::new("/").join(path);
    if path.is_empty() || path.contains('\0') || absolute == Path::new("/") {
        return Err(Refusal::invalid("container_path", format!("{path:?} is no path for a mount")));
    }
    if leads_upwards(&absolute) {
        return Err(Refusal::invalid("container_path", format!("{path:?} leads upwards")));
    }
    let clean: PathBuf = absolute.components().collect();
    Ok(clean.to_string_lossy().into_owned())
}

pub fn leads_upwards(path: &Path) -> bool {
    path.components().any(|part| part == Component::ParentDir)
}
