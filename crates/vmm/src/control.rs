//! The control socket, served by the main thread, which never blocks on a device or a vCPU.
//!
//! Status, Counters and Kill are answered at once. Requests that may wait for a device or a vCPU go
//! to the control thread, whose replies come back through a queue. Each client has one request at a
//! time; until it is answered nothing more is read from that client, so a client occupies at most
//! one packet and its file descriptors.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{SockFlag, accept4};
use vmm_api::transport::{TransportError, receive, send};
use vmm_api::{Counters, Error, ExitReason, Reply, Request, VmStatus};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::console::Console;
use crate::exit::{ExitPoll, ExitState};

/// Most connections. Attack: a process that may connect does so until the VMM has no file
/// descriptors left.
const CLIENTS_MAX: usize = 64;
const EVENTS: usize = 16;

const LISTENER: u64 = 0;
const EXIT: u64 = 1;
const CONSOLE: u64 = 2;
const REPLIES: u64 = 3;
const SIGNALS: u64 = 4;
/// First epoll token of a client.
const FIRST_CLIENT: u64 = 16;

/// A reply and the file descriptors that are sent with it.
pub type Answer = (Reply, Vec<OwnedFd>);

/// What requests are carried out on; tests use a fake.
pub trait Vm: Send + Sync {
    /// Must not block.
    fn status(&self) -> VmStatus;
    /// Must not block.
    fn counters(&self) -> Counters;
    /// Any other request; may block. Called on the control thread only.
    fn perform(&self, request: Request, fds: Vec<OwnedFd>) -> Answer;
}

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("{what}")]
    Os { what: &'static str, source: io::Error },
}

fn os<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> ControlError {
    move |source| ControlError::Os { what, source: source.into() }
}

/// The event loop of the main thread.
pub struct Server {
    epoll: Epoll,
    listener: OwnedFd,
    signals: OwnedFd,
    exit: ExitState,
    console: Console,
    vm: Arc<dyn Vm>,
    clients: HashMap<u64, OwnedFd>,
    next: u64,
    requests: Sender<ClientRequest>,
    replies: Arc<Replies>,
}

struct ClientRequest {
    client: u64,
    request: Request,
    fds: Vec<OwnedFd>,
}

struct Replies {
    queue: Mutex<VecDeque<(u64, Answer)>>,
    event: EventFd,
}

impl Server {
    /// Prepares the event loop and starts the control thread, on which `init` runs first. `signals`
    /// is a signalfd of the signals that end the VM.
    pub fn new(
        listener: OwnedFd,
        signals: OwnedFd,
        exit: ExitState,
        console: Console,
        vm: Arc<dyn Vm>,
        init: impl FnOnce() + Send + 'static,
    ) -> Result<Self, ControlError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(os("epoll"))?;
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(os("eventfd"))?;
        let replies = Arc::new(Replies { queue: Mutex::default(), event });
        let (requests, receiver) = channel();
        let worker = (vm.clone(), replies.clone());
        std::thread::Builder::new()
            .name("control".to_owned())
            .stack_size(256 << 10)
            .spawn(move || {
                init();
                perform_requests(&receiver, &*worker.0, &worker.1);
            })
            .map_err(os("cannot start the control thread"))?;
        nonblocking(&listener).map_err(os("control socket"))?;
        let watch = |fd: RawFd, token| {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
            epoll_add(&epoll, fd, event).map_err(os("epoll_ctl"))
        };
        watch(listener.as_raw_fd(), LISTENER)?;
        watch(exit.event().as_raw_fd(), EXIT)?;
        watch(console.event().as_raw_fd(), CONSOLE)?;
        watch(replies.event.as_raw_fd(), REPLIES)?;
        watch(signals.as_raw_fd(), SIGNALS)?;
        let (clients, next) = (HashMap::new(), FIRST_CLIENT);
        Ok(Self { epoll, listener, signals, exit, console, vm, clients, next, requests, replies })
    }

    /// Runs until the VM has ended.
    pub fn run(&mut self) -> Result<(), ControlError> {
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let now = Instant::now();
            let flush = self.console.poll(now);
            let ExitPoll::Running { poll_at } = self.exit.poll(now) else { return Ok(()) };
            let wake = [flush, poll_at].into_iter().flatten().min();
            let count = match self.epoll.wait(&mut events, timeout(now, wake)) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(e) => return Err(os("epoll_wait")(e)),
            };
            for event in &events[..count] {
                self.dispatch(event.data());
            }
        }
    }

    fn dispatch(&mut self, token: u64) {
        match token {
            LISTENER => self.accept(),
            EXIT => drop(self.exit.event().read()),
            CONSOLE => drop(self.console.event().read()),
            REPLIES => self.deliver(),
            SIGNALS => {
                let mut info = [0; 128];
                // `struct signalfd_siginfo` begins with the signal number.
                let number = match nix::unistd::read(&self.signals, &mut info) {
                    Ok(128) => u32::from_le_bytes([info[0], info[1], info[2], info[3]]) as i32,
                    _ => return,
                };
                let name = nix::sys::signal::Signal::try_from(number)
                    .map_or("a signal", nix::sys::signal::Signal::as_str);
                self.exit.set(ExitReason::Killed, format!("VMM was terminated by {name}"));
            }
            client => self.receive(client),
        }
    }

    fn accept(&mut self) {
        // One per event, so that other events are handled in between.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let Ok(raw) = accept4(self.listener.as_raw_fd(), flags) else { return };
        let client = own(raw);
        if self.clients.len() >= CLIENTS_MAX {
            return;
        }
        let token = self.next;
        let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
        if epoll_add(&self.epoll, client.as_raw_fd(), event).is_ok() {
            self.next += 1;
            self.clients.insert(token, client);
        }
    }

    fn receive(&mut self, token: u64) {
        let Some(client) = self.clients.get(&token) else { return };
        let (request, fds) = match receive::<Request>(client.as_fd()) {
            Ok(received) => received,
            Err(TransportError::Socket(Errno::EAGAIN | Errno::EINTR)) => return,
            Err(TransportError::Closed | TransportError::Socket(_)) => {
                return self.disconnect(token);
            }
            Err(error) => {
                let message = crate::chain(&error);
                return self.reply(token, &Reply::Error(Error::Malformed { message }));
            }
        };
        let want = match request {
            Request::AddDisk { .. }
            | Request::AddNet { .. }
            | Request::AddFs { .. }
            | Request::Snapshot => 1,
            _ => 0,
        };
        if fds.len() != want {
            let error = Error::Descriptors { got: fds.len(), want };
            return self.reply(token, &Reply::Error(error));
        }
        match request {
            Request::Status => self.reply(token, &Reply::Status(self.vm.status())),
            Request::Counters => self.reply(token, &Reply::Counters(self.vm.counters())),
            Request::Kill => {
                // The loop ends in its next iteration, after the reply was sent.
                self.exit.set(ExitReason::Killed, "VM was killed by a Kill request");
                self.reply(token, &Reply::Done);
            }
            request => {
                self.set_polled(token, false);
                let request = ClientRequest { client: token, request, fds };
                if self.requests.send(request).is_err() {
                    let message = "the control thread has ended".to_owned();
                    self.reply(token, &Reply::Error(Error::Failed { message }));
                    self.set_polled(token, true);
                }
            }
        }
    }

    fn deliver(&mut self) {
        let _ = self.replies.event.read();
        loop {
            let next = {
                let mut queue = self.replies.queue.lock().unwrap_or_else(PoisonError::into_inner);
                queue.pop_front()
            };
            let Some((token, (reply, fds))) = next else { return };
            self.reply_with(token, &reply, &fds);
            self.set_polled(token, true);
        }
    }

    fn set_polled(&mut self, token: u64, polled: bool) {
        let Some(client) = self.clients.get(&token) else { return };
        // Without EPOLLIN a hang-up is still reported, as EPOLLHUP.
        let flags = if polled { EpollFlags::EPOLLIN } else { EpollFlags::empty() };
        let mut event = EpollEvent::new(flags, token);
        if self.epoll.modify(client, &mut event).is_err() {
            self.disconnect(token);
        }
    }

    fn reply(&mut self, token: u64, reply: &Reply) {
        self.reply_with(token, reply, &[]);
    }

    fn reply_with(&mut self, token: u64, reply: &Reply, fds: &[OwnedFd]) {
        let Some(client) = self.clients.get(&token) else { return };
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        // A client that does not read its replies is disconnected; the main thread must not block.
        if let Err(error) = send(client.as_fd(), reply, &fds) {
            tracing::warn!(%error, "cannot reply to a client of the control socket");
            self.disconnect(token);
        }
    }

    fn disconnect(&mut self, token: u64) {
        // Closing removes it from epoll: there is no duplicate of the file descriptor.
        self.clients.remove(&token);
    }
}

fn perform_requests(requests: &Receiver<ClientRequest>, vm: &dyn Vm, replies: &Replies) {
    while let Ok(ClientRequest { client, request, fds }) = requests.recv() {
        let reply = vm.perform(request, fds);
        let mut queue = replies.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.push_back((client, reply));
        drop(queue);
        // EAGAIN: the counter is full, so the main thread is woken anyway.
        let _ = replies.event.write(1);
    }
}

fn timeout(now: Instant, wake: Option<Instant>) -> EpollTimeout {
    let Some(wake) = wake else { return EpollTimeout::NONE };
    // Rounded up, so that the timer is due when epoll_wait returns.
    let millis = wake.saturating_duration_since(now).as_millis() + 1;
    EpollTimeout::from(millis.min(60_000) as u16)
}

fn nonblocking(fd: &OwnedFd) -> nix::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

#[allow(unsafe_code)] // accept4 returns a plain number
fn own(fd: RawFd) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: accept4 has just returned this file descriptor; nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[allow(unsafe_code)] // nix wants a borrow that ends with the call, epoll keeps the number
fn epoll_add(epoll: &Epoll, fd: RawFd, event: EpollEvent) -> nix::Result<()> {
    // SAFETY: `fd` is open: it belongs to the server or to a field of it, and is not closed before
    // the server is dropped or has removed it.
    epoll.add(unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }, event)
}

#[cfg(test)]
mod tests;
