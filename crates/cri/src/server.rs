//! The unix socket, and the server on it.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use tonic::transport::Server;

use crate::observe::{ObserveLayer, Observer};
use crate::v1::image_service_server::ImageServiceServer;
use crate::v1::runtime_service_server::RuntimeServiceServer;
use crate::{Image, Runtime};

/// Maximum size of a message in both directions, as in containerd. Attack: a client that makes the
/// daemon buffer a message of any size.
pub const MAX_MESSAGE: usize = 16 << 20;
/// The response of ExecSync has two streams of up to the limit each.
const EXEC_REPLY: usize = 2 * MAX_MESSAGE + (1 << 20);
/// Owner and group: whoever may talk to the socket is root on this node.
const SOCKET_MODE: u32 = 0o660;
/// Requests a connection may have under way; a client that opens more waits.
const MAX_STREAMS: u32 = 1024;

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("{} is served by a running nacelled: stop that one, or choose another socket", .0.display())]
    InUse(PathBuf),
    #[error("{} is there and is no socket: choose another path", .0.display())]
    NotASocket(PathBuf),
    #[error("socket {}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Binds the socket. A stale one, which nobody answers, is replaced; a live one is left alone.
///
/// The socket is created beside the path and then renamed, so that it never has other permissions
/// at the path.
pub fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    let fail = |source| ListenError::Io { path: path.to_owned(), source };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(fail)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(metadata) => {
            use std::os::unix::fs::FileTypeExt;
            if !metadata.file_type().is_socket() {
                return Err(ListenError::NotASocket(path.to_owned()));
            }
            if UnixStream::connect(path).is_ok() {
                return Err(ListenError::InUse(path.to_owned()));
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail(error)),
    }
    let mut other = path.as_os_str().to_owned();
    other.push(".new");
    let other = PathBuf::from(other);
    let _ = std::fs::remove_file(&other);
    let listener = UnixListener::bind(&other).map_err(fail)?;
    std::fs::set_permissions(&other, std::fs::Permissions::from_mode(SOCKET_MODE))
        .and_then(|()| std::fs::rename(&other, path))
        .map_err(fail)?;
    Ok(listener)
}

/// Completes when the server is to stop.
pub type Shutdown = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// Serves both services, and whatever else `other` holds, until `shutdown`; then finishes the
/// requests under way. `observer` receives each call of the CRI.
pub async fn serve(
    listener: UnixListener,
    runtime: Runtime,
    images: Image,
    other: Routes,
    observer: Option<Arc<dyn Observer>>,
    shutdown: Shutdown,
) -> Result<(), tonic::transport::Error> {
    let stopping = runtime.stopping.clone();
    let shutdown = async move {
        shutdown.await;
        stopping.cancel();
    };
    let runtime = RuntimeServiceServer::new(runtime)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(EXEC_REPLY);
    let images = ImageServiceServer::new(images)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .layer(ObserveLayer(observer))
        .add_routes(other.add_service(runtime).add_service(images))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/s.sock");
        let first = listen(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, SOCKET_MODE);
        assert!(matches!(listen(&path), Err(ListenError::InUse(_))));
        drop(first);
        assert!(listen(&path).is_ok());
    }

    #[tokio::test]
    async fn what_is_no_socket_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "x").unwrap();
        assert!(matches!(listen(&path), Err(ListenError::NotASocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"x");
    }
}
