//! Written-back files (termination log): copied into the guest at creation, read back before the
//! container's exit is reported.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent_api::v1;

use super::handle::Handle;
use super::volume_ids::volume_id;
use crate::error::Error;
use crate::host::volumes::{SourceKind, open_for_writing, overwrite, source_kind};
use crate::model::VolumeSource;

/// Bytes read from the guest; a kubelet reads 4 KiB of a termination log.
const MAX_BYTES: usize = 64 << 10;
/// Limit for all files of a container: a slow guest must not delay the report of an exit.
const LIMIT: Duration = Duration::from_secs(5);

/// Opens the host's file once: later changes of the path have no effect.
pub(super) async fn open(
    handle: &Handle,
    container: &str,
    n: usize,
    path: &Path,
) -> Result<(), Error> {
    let what = format!("open {}", path.display());
    let path = path.to_owned();
    let file = handle.lookups.run_with_limit(what, move || match source_kind(&path)? {
        SourceKind::File { .. } => open_for_writing(&path),
        SourceKind::Directory => Err(Error::invalid(format!("{} is a directory", path.display()))),
    });
    let file = file.await??;
    handle.set_written_back(container, n, Arc::new(file));
    Ok(())
}

/// Copies the container's written files to the host, as far as possible.
pub(super) async fn write_back(handle: &Handle, id: &str) {
    let Ok(container) = handle.container(id) else { return };
    if container.started_at.is_none() {
        return;
    }
    let all = async {
        for (n, volume) in container.spec.volumes.iter().enumerate() {
            let VolumeSource::WrittenBack { host_path } = &volume.source else { continue };
            if let Err(error) = one(handle, id, n, host_path).await {
                let path = host_path.display();
                tracing::warn!(container = id, %path, %error, "file is not written back");
            }
        }
    };
    if tokio::time::timeout(LIMIT, all).await.is_err() {
        tracing::warn!(container = id, "guest is slow, files are not written back");
    }
}

async fn one(handle: &Handle, container: &str, n: usize, path: &Path) -> Result<(), Error> {
    let request = v1::ReadVolumeFileRequest {
        volume_id: volume_id(container, n),
        path: SourceKind::FILE.to_owned(),
        limit: MAX_BYTES as u64,
    };
    let read =
        handle.guest.call("read a file", |mut c| async move { c.read_volume_file(request).await });
    let mut content = read.await?.content;
    content.truncate(MAX_BYTES);
    let opened: Option<Arc<File>> = handle.written_back(container, n);
    let what = format!("write {}", path.display());
    let path = path.to_owned();
    let written = handle.lookups.run_with_limit(what, move || {
        let file = match opened {
            Some(file) => file,
            // The previous daemon had opened it.
            None => Arc::new(open_for_writing(&path)?),
        };
        overwrite(&file, &content).map_err(|e| Error::io(format!("write {}", path.display()), e))
    });
    written.await?
}
