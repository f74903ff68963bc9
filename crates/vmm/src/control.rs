//! The control socket, served by the main thread, which waits for nobody.
//!
//! Status, counters and kill are answered from atomics at once. Everything that may have to wait
//! for a device or a vCPU goes to the `orders` thread; its reply comes back through a queue. A
//! client has one request under way; until that is answered nothing more is read from it, so a
//! client can hold one packet and its descriptors here, no more.

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
use crate::end::{End, Poll};

/// Most connections. Attack: somebody who may open the socket opens it until the VMM has no
/// descriptors left.
const CLIENTS_MAX: usize = 64;
const EVENTS: usize = 16;

const LISTENER: u64 = 0;
const END: u64 = 1;
const CONSOLE: u64 = 2;
const REPLIES: u64 = 3;
const SIGNALS: u64 = 4;
/// Clients are numbered from here on.
const FIRST_CLIENT: u64 = 16;

/// What the control socket reaches; a fake stands in for it in tests.
pub trait Vm: Send + Sync {
    /// Answers at once.
    fn status(&self) -> VmStatus;
    /// Answers at once.
    fn counters(&self) -> Counters;
    /// Carries out what may take its time. Called by one thread.
    fn perform(&self, request: Request, fds: Vec<OwnedFd>) -> Reply;
}

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("{what}")]
    Os { what: &'static str, source: io::Error },
}

fn os<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> ControlError {
    move |source| ControlError::Os { what, source: source.into() }
}

/// The main thread's loop.
pub struct Server {
    epoll: Epoll,
    listener: OwnedFd,
    signals: OwnedFd,
    end: End,
    console: Console,
    vm: Arc<dyn Vm>,
    clients: HashMap<u64, OwnedFd>,
    next: u64,
    orders: Sender<Order>,
    replies: Arc<Replies>,
}

struct Order {
    client: u64,
    request: Request,
    fds: Vec<OwnedFd>,
}

struct Replies {
    queue: Mutex<VecDeque<(u64, Reply)>>,
    event: EventFd,
}

impl Server {
    /// Prepares the loop and starts the `orders` thread, on which `init` runs first. `signals` is a
    /// signalfd of the signals that end the VM.
    pub fn new(
        listener: OwnedFd,
        signals: OwnedFd,
        end: End,
        console: Console,
        vm: Arc<dyn Vm>,
        init: impl FnOnce() + Send + 'static,
    ) -> Result<Self, ControlError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(os("epoll"))?;
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(os("eventfd"))?;
        let replies = Arc::new(Replies { queue: Mutex::default(), event });
        let (orders, receiver) = channel();
        let worker = (vm.clone(), replies.clone());
        std::thread::Builder::new()
            .name("orders".to_owned())
            .stack_size(256 << 10)
            .spawn(move || {
                init();
                obey(&receiver, &*worker.0, &worker.1);
            })
            .map_err(os("cannot start the orders thread"))?;
        nonblocking(&listener).map_err(os("control socket"))?;
        let watch = |fd: RawFd, token| {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
            epoll_add(&epoll, fd, event).map_err(os("epoll_ctl"))
        };
        watch(listener.as_raw_fd(), LISTENER)?;
        watch(end.event().as_raw_fd(), END)?;
        watch(console.event().as_raw_fd(), CONSOLE)?;
        watch(replies.event.as_raw_fd(), REPLIES)?;
        watch(signals.as_raw_fd(), SIGNALS)?;
        let (clients, next) = (HashMap::new(), FIRST_CLIENT);
        Ok(Self { epoll, listener, signals, end, console, vm, clients, next, orders, replies })
    }

    /// Serves until the VM has ended.
    pub fn run(&mut self) -> Result<(), ControlError> {
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let now = Instant::now();
            let flush = self.console.poll(now);
            let Poll::Running { look_again } = self.end.poll(now) else { return Ok(()) };
            let wake = [flush, look_again].into_iter().flatten().min();
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
            END => drop(self.end.event().read()),
            CONSOLE => drop(self.console.event().read()),
            REPLIES => self.deliver(),
            SIGNALS => {
                let mut info = [0; 128];
                // A signalfd's record begins with the signal's number.
                let number = match nix::unistd::read(&self.signals, &mut info) {
                    Ok(128) => u32::from_le_bytes([info[0], info[1], info[2], info[3]]) as i32,
                    _ => return,
                };
                let name = nix::sys::signal::Signal::try_from(number)
                    .map_or("a signal", nix::sys::signal::Signal::as_str);
                self.end.set(ExitReason::Killed, format!("VMM was ended by {name}"));
            }
            client => self.receive(client),
        }
    }

    fn accept(&mut self) {
        // One a round: events of others come in between.
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
            Err(TransportError::Closed | TransportError::Socket(_)) => return self.hang_up(token),
            Err(error) => {
                let message = crate::chain(&error);
                return self.reply(token, &Reply::Error(Error::Malformed { message }));
            }
        };
        let want = match request {
            Request::AddDisk { .. } | Request::AddNet { .. } | Request::AddFs { .. } => 1,
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
                // The loop ends with its next round: first the reply goes out.
                self.end.set(ExitReason::Killed, "VM was killed on request");
                self.reply(token, &Reply::Done);
            }
            request => {
                self.listen_to(token, false);
                let order = Order { client: token, request, fds };
                if self.orders.send(order).is_err() {
                    let message = "the orders thread has ended".to_owned();
                    self.reply(token, &Reply::Error(Error::Failed { message }));
                    self.listen_to(token, true);
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
            let Some((token, reply)) = next else { return };
            self.reply(token, &reply);
            self.listen_to(token, true);
        }
    }

    fn listen_to(&mut self, token: u64, listen: bool) {
        let Some(client) = self.clients.get(&token) else { return };
        // Without EPOLLIN a hang-up is still reported, as EPOLLHUP.
        let flags = if listen { EpollFlags::EPOLLIN } else { EpollFlags::empty() };
        let mut event = EpollEvent::new(flags, token);
        if self.epoll.modify(client, &mut event).is_err() {
            self.hang_up(token);
        }
    }

    fn reply(&mut self, token: u64, reply: &Reply) {
        let Some(client) = self.clients.get(&token) else { return };
        // A client that does not take its replies is hung up on: nobody waits for it.
        if let Err(error) = send(client.as_fd(), reply, &[]) {
            tracing::warn!(%error, "control client is gone");
            self.hang_up(token);
        }
    }

    fn hang_up(&mut self, token: u64) {
        // Closing removes it from the epoll: there is no duplicate.
        self.clients.remove(&token);
    }
}

fn obey(orders: &Receiver<Order>, vm: &dyn Vm, replies: &Replies) {
    while let Ok(Order { client, request, fds }) = orders.recv() {
        let reply = vm.perform(request, fds);
        let mut queue = replies.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.push_back((client, reply));
        drop(queue);
        // A full counter (EAGAIN) has woken the main thread already.
        let _ = replies.event.write(1);
    }
}

fn timeout(now: Instant, wake: Option<Instant>) -> EpollTimeout {
    let Some(wake) = wake else { return EpollTimeout::NONE };
    // Rounded up, so that it is really due then.
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
    // SAFETY: accept4 has just returned this descriptor; nothing else knows its number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[allow(unsafe_code)] // nix wants a borrow that ends with the call, epoll keeps the number
fn epoll_add(epoll: &Epoll, fd: RawFd, event: EpollEvent) -> nix::Result<()> {
    // SAFETY: `fd` is open: it belongs to the server, or to what the server holds, and is not
    // closed before the server is dropped or has removed it.
    epoll.add(unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }, event)
}

#[cfg(test)]
mod tests;
