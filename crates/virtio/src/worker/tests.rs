use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use super::*;
use crate::device::Poll;
use crate::mock::MockInterrupt;

const LIMIT: Duration = Duration::from_secs(5);

/// Counts calls of `handle`; `greedy` reschedules itself forever once its eventfd was written.
struct Probe {
    event: EventFd,
    handled: Arc<AtomicUsize>,
    greedy: bool,
    fails: bool,
    /// Not drained before this is set.
    may_drain: Arc<AtomicBool>,
    ticks: Arc<Mutex<Vec<Instant>>>,
    next_tick: Option<Instant>,
}

impl Probe {
    fn new() -> Self {
        Self {
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
            handled: Arc::default(),
            greedy: false,
            fails: false,
            may_drain: Arc::new(AtomicBool::new(true)),
            ticks: Arc::default(),
            next_tick: None,
        }
    }
}

impl Engine for Probe {
    fn start(&mut self, poll: &mut Poll<'_>) -> io::Result<()> {
        if self.fails {
            return Err(io::ErrorKind::Unsupported.into());
        }
        poll.add(self.event.as_raw_fd(), 7, EventSet::IN)
    }

    fn handle(&mut self, token: u32, _events: EventSet, poll: &mut Poll<'_>) {
        assert_eq!(token, 7);
        let _ = self.event.read();
        self.handled.fetch_add(1, Ordering::AcqRel);
        if self.greedy {
            poll.reschedule(7);
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.next_tick
    }

    fn tick(&mut self, now: Instant, _poll: &mut Poll<'_>) {
        self.ticks.lock().unwrap().push(now);
        self.next_tick = None;
    }

    fn drained(&mut self) -> bool {
        self.may_drain.load(Ordering::Acquire)
    }
}

fn worker() -> Worker {
    Worker::spawn("test", || {}).unwrap()
}

fn attach(worker: &Worker, probe: Probe) -> Attachment {
    worker.handle().attach(Box::new(probe), Arc::new(MockInterrupt::default())).unwrap()
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_busy_engine_does_not_starve_others() {
    let worker = worker();
    let (mut greedy, modest) = (Probe::new(), Probe::new());
    greedy.greedy = true;
    let (count, event) = (greedy.handled.clone(), greedy.event.try_clone().unwrap());
    attach(&worker, greedy);
    event.write(1).unwrap();
    eventually("busy engine", || count.load(Ordering::Acquire) > 1000);
    let (handled, event) = (modest.handled.clone(), modest.event.try_clone().unwrap());
    attach(&worker, modest);
    for round in 1..20 {
        event.write(1).unwrap();
        eventually("handled", || handled.load(Ordering::Acquire) >= round);
    }
    worker.stop(LIMIT).unwrap();
}

#[test]
fn init_runs_first_on_the_thread() {
    let name = Arc::new(Mutex::new(None));
    let copy = name.clone();
    let init = move || {
        *copy.lock().unwrap() = std::thread::current().name().map(str::to_owned);
    };
    let worker = Worker::spawn("disk-worker", init).unwrap();
    worker.handle().pause(LIMIT).unwrap();
    assert_eq!(name.lock().unwrap().as_deref(), Some("disk-worker"));
}

#[test]
fn a_detached_engine_is_dropped_after_it_has_drained() {
    let worker = worker();
    let probe = Probe::new();
    let (may_drain, handled) = (probe.may_drain.clone(), probe.handled.clone());
    let event = probe.event.try_clone().unwrap();
    may_drain.store(false, Ordering::Release);
    let detached = attach(&worker, probe).detach();
    assert!(!detached.wait(Duration::from_millis(50)));
    may_drain.store(true, Ordering::Release);
    assert!(detached.wait(LIMIT));
    // Its eventfd is still open here, but not in the epoll any more.
    let before = handled.load(Ordering::Acquire);
    event.write(1).unwrap();
    worker.handle().pause(LIMIT).unwrap();
    assert_eq!(handled.load(Ordering::Acquire), before);
}

#[test]
fn a_pause_that_cannot_complete_fails_at_its_deadline_and_resume_still_works() {
    let worker = worker();
    let probe = Probe::new();
    let (may_drain, handled) = (probe.may_drain.clone(), probe.handled.clone());
    let event = probe.event.try_clone().unwrap();
    may_drain.store(false, Ordering::Release);
    attach(&worker, probe);
    let limit = Duration::from_millis(50);
    let paused = worker.handle().pause(limit);
    assert!(matches!(paused, Err(WorkerError::Deadline { .. })));
    event.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(handled.load(Ordering::Acquire), 0);
    may_drain.store(true, Ordering::Release);
    worker.handle().pause(LIMIT).unwrap();
    worker.handle().resume().unwrap();
    eventually("the event", || handled.load(Ordering::Acquire) == 1);
}

#[test]
fn tick_is_called_once_at_its_deadline() {
    let worker = worker();
    let mut probe = Probe::new();
    let due = Instant::now() + Duration::from_millis(30);
    probe.next_tick = Some(due);
    let ticks = probe.ticks.clone();
    attach(&worker, probe);
    eventually("a tick", || !ticks.lock().unwrap().is_empty());
    std::thread::sleep(Duration::from_millis(50));
    let ticks = ticks.lock().unwrap();
    assert_eq!(ticks.len(), 1);
    assert!(ticks[0] >= due);
}

#[test]
fn an_engine_that_cannot_start_sets_needs_reset() {
    let worker = worker();
    let interrupt = Arc::new(MockInterrupt::default());
    let mut probe = Probe::new();
    probe.fails = true;
    let attached = worker.handle().attach(Box::new(probe), interrupt.clone()).unwrap();
    eventually("DEVICE_NEEDS_RESET", || interrupt.reset_wanted.load(Ordering::Acquire));
    assert!(attached.detach().wait(LIMIT));
}

#[test]
fn commands_to_a_stopped_worker_fail_without_waiting() {
    let worker = worker();
    let handle = worker.handle();
    let attached = attach(&worker, Probe::new());
    worker.stop(LIMIT).unwrap();
    assert!(matches!(handle.pause(LIMIT), Err(WorkerError::Stopped)));
    assert!(attached.detach().wait(LIMIT));
}
