use std::path::PathBuf;
use std::sync::Barrier;
use std::time::Duration;

use nix::sys::signal::SigSet;
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{AddressFamily, Backlog, SockType, UnixAddr, bind, listen, socket};
use vmm_api::client::{Client, ClientError};
use vmm_api::{DiskConfig, Fd, Phase};

use super::*;

/// A VM whose Pause blocks until the barrier is passed.
struct Fake {
    hang: Barrier,
}

impl Vm for Fake {
    fn status(&self) -> VmStatus {
        VmStatus {
            version: 1,
            phase: Phase::Running,
            pid: 1,
            vcpus: 2,
            memory_mib: 256,
            plugged_mib: 256,
            max_memory_mib: 256,
            devices: vec![],
        }
    }
    fn counters(&self) -> Counters {
        Counters { start_us: 7, ..Default::default() }
    }
    fn perform(&self, request: Request, fds: Vec<OwnedFd>) -> (Reply, Vec<OwnedFd>) {
        let reply = match request {
            // As guest memory: the file of the request.
            Request::Snapshot => return (Reply::Saved, fds),
            Request::AddDisk { .. } => Reply::Added { pci: format!("{} fds", fds.len()) },
            Request::Pause => {
                self.hang.wait();
                Reply::Done
            }
            Request::RemoveDevice { id } => Reply::Error(Error::NoSuchDevice { id }),
            _ => Reply::Done,
        };
        (reply, Vec::new())
    }
}

struct Running {
    dir: tempfile::TempDir,
    vm: Arc<Fake>,
    exit: ExitState,
    thread: Option<std::thread::JoinHandle<Result<(), ControlError>>>,
}

impl Running {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(&dir.path().join("control")).unwrap()).unwrap();
        listen(&fd, Backlog::new(16).unwrap()).unwrap();
        let vm = Arc::new(Fake { hang: Barrier::new(2) });
        let exit = ExitState::new().unwrap();
        let console = Console::new(tempfile::tempfile().unwrap()).unwrap();
        let signals = OwnedFd::from(SignalFd::new(&SigSet::empty()).unwrap());
        let mut server =
            Server::new(fd, signals, exit.clone(), console, vm.clone(), || {}).unwrap();
        let thread = Some(std::thread::spawn(move || server.run()));
        Self { dir, vm, exit, thread }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("control")
    }

    fn client(&self) -> Client {
        Client::connect(&self.path(), Duration::from_secs(5)).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.exit.set(ExitReason::Killed, "test is over");
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

fn disk() -> Request {
    let disk = DiskConfig { serial: "d".to_owned(), file: Fd(0), read_only: false };
    Request::AddDisk { disk }
}

#[test]
fn status_is_answered_while_another_request_blocks() {
    let running = Running::new();
    let (slow, quick) = (running.client(), running.client());
    std::thread::scope(|scope| {
        let pause = scope.spawn(|| slow.order(&Request::Pause));
        for _ in 0..20 {
            let reply = quick.call(&Request::Status, &[]).unwrap();
            assert!(matches!(reply, Reply::Status(VmStatus { vcpus: 2, .. })));
        }
        assert!(!pause.is_finished());
        running.vm.hang.wait();
        pause.join().unwrap().unwrap();
    });
}

#[test]
fn file_descriptors_reach_the_vm_and_missing_ones_are_refused() {
    let running = Running::new();
    let client = running.client();
    let file = tempfile::tempfile().unwrap();
    let reply = client.call(&disk(), &[file.as_fd()]).unwrap();
    assert_eq!(reply, Reply::Added { pci: "1 fds".to_owned() });
    let refused = client.call(&disk(), &[]);
    assert!(matches!(refused, Err(ClientError::Refused(Error::Descriptors { got: 0, want: 1 }))));
    let refused = client.call(&Request::Status, &[file.as_fd()]);
    assert!(matches!(refused, Err(ClientError::Refused(Error::Descriptors { got: 1, want: 0 }))));
}

#[test]
fn the_file_of_a_snapshot_comes_with_the_reply() {
    let running = Running::new();
    let mut file = tempfile::tempfile().unwrap();
    io::Write::write_all(&mut file, b"memory").unwrap();
    let received = running.client().snapshot(file.as_fd()).unwrap();
    assert_eq!(received.metadata().unwrap().len(), 6);
}

#[test]
fn an_invalid_packet_is_answered_with_an_error_and_the_connection_continues() {
    let running = Running::new();
    let client = running.client();
    let long = vec![b'x'; vmm_api::transport::MAX_PACKET];
    for bad in [&b"{"[..], &[0xff; 100], &long] {
        let raw = connect(&running);
        nix::unistd::write(&raw, bad).unwrap();
        let (reply, _) = receive::<Reply>(raw.as_fd()).unwrap();
        assert!(matches!(reply, Reply::Error(Error::Malformed { .. })), "{reply:?}");
        send(raw.as_fd(), &Request::Counters, &[]).unwrap();
        let (reply, _) = receive::<Reply>(raw.as_fd()).unwrap();
        assert!(matches!(reply, Reply::Counters(Counters { start_us: 7, .. })));
    }
    assert!(client.order(&Request::Resume).is_ok());
}

#[test]
fn errors_keep_their_type() {
    let running = Running::new();
    let gone = running.client().order(&Request::RemoveDevice { id: "x".to_owned() });
    assert!(matches!(gone, Err(ClientError::Refused(Error::NoSuchDevice { id })) if id == "x"));
}

#[test]
fn clients_over_the_limit_are_disconnected_and_the_others_served() {
    let running = Running::new();
    let clients: Vec<_> = (0..CLIENTS_MAX).map(|_| running.client()).collect();
    clients[CLIENTS_MAX - 1].call(&Request::Status, &[]).unwrap();
    assert!(running.client().call(&Request::Status, &[]).is_err());
    clients[0].call(&Request::Status, &[]).unwrap();
    drop(clients);
    // New clients are accepted once the server has seen the others disconnect.
    let served = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        running.client().call(&Request::Status, &[]).is_ok()
    });
    assert!(served);
}

#[test]
fn kill_is_answered_and_ends_the_vm() {
    let running = Running::new();
    running.client().order(&Request::Kill).unwrap();
    assert_eq!(running.exit.report(b"").reason, ExitReason::Killed);
}

#[test]
fn a_client_that_disconnects_during_its_request_is_removed() {
    let running = Running::new();
    let raw = connect(&running);
    send(raw.as_fd(), &Request::Pause, &[]).unwrap();
    drop(raw);
    running.vm.hang.wait();
    running.client().call(&Request::Status, &[]).unwrap();
}

fn connect(running: &Running) -> OwnedFd {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).unwrap();
    let address = UnixAddr::new(&running.path()).unwrap();
    nix::sys::socket::connect(fd.as_raw_fd(), &address).unwrap();
    fd
}
