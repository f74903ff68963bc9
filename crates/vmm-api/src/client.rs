//! A blocking client of the control socket, with a deadline on every call.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::transport::{TransportError, receive, send};
use crate::{Error, Reply, Request};

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot connect to a VMM at {path}")]
    Connect { path: String, source: nix::Error },
    #[error("VMM did not answer within {limit:?}")]
    Deadline { limit: Duration },
    #[error(transparent)]
    Transport(TransportError),
    #[error(transparent)]
    Refused(#[from] Error),
    #[error("VMM answered {got:?} to {request:?}")]
    Unexpected { request: Request, got: Reply },
}

/// A connection to one VMM.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    limit: Duration,
}

impl Client {
    /// Connects to the control socket at `path`. Every later call fails with
    /// [`ClientError::Deadline`] after `limit`.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self, ClientError> {
        let failed = |source| ClientError::Connect { path: path.display().to_string(), source };
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
            .map_err(failed)?;
        let time = TimeVal::milliseconds(limit.as_millis().try_into().unwrap_or(i64::MAX));
        setsockopt(&socket, sockopt::SendTimeout, &time).map_err(failed)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &time).map_err(failed)?;
        let address = UnixAddr::new(path).map_err(failed)?;
        connect(socket.as_raw_fd(), &address).map_err(failed)?;
        Ok(Self { socket, limit })
    }

    /// Sends a request with its file descriptors and waits for the reply. [`Reply::Error`] is
    /// returned as [`ClientError::Refused`].
    pub fn call(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply, ClientError> {
        Ok(self.exchange(request, fds)?.0)
    }

    /// Saves the paused VM: its state is written to `state`. Returns the file with its memory.
    pub fn snapshot(&self, state: BorrowedFd<'_>) -> Result<File, ClientError> {
        let request = Request::Snapshot;
        match self.exchange(&request, &[state])? {
            (Reply::Saved, mut fds) => match fds.pop() {
                Some(memory) => Ok(File::from(memory)),
                None => Err(ClientError::Unexpected { request, got: Reply::Saved }),
            },
            (got, _) => Err(ClientError::Unexpected { request, got }),
        }
    }

    fn exchange(
        &self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        send(self.socket.as_fd(), request, fds).map_err(|e| self.deadline(e))?;
        match receive::<Reply>(self.socket.as_fd()).map_err(|e| self.deadline(e))? {
            (Reply::Error(error), _) => Err(error.into()),
            answer => Ok(answer),
        }
    }

    /// [`Self::call`] for requests without file descriptors that are answered with [`Reply::Done`].
    pub fn order(&self, request: &Request) -> Result<(), ClientError> {
        match self.call(request, &[])? {
            Reply::Done => Ok(()),
            got => Err(ClientError::Unexpected { request: request.clone(), got }),
        }
    }

    fn deadline(&self, error: TransportError) -> ClientError {
        match error {
            TransportError::Socket(nix::Error::EAGAIN) => {
                ClientError::Deadline { limit: self.limit }
            }
            error => ClientError::Transport(error),
        }
    }
}
