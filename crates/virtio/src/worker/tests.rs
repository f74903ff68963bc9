use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use super::*;
use crate::mock::MockInterrupt;

const LIMIT: Duration = Duration::from_secs(5);

/// Counts how often it is handled; with a bell it can be made busy for ever.
struct Probe {
    bell: EventFd,
    handled: Arc<AtomicUsize>,
    greedy: bool,
    fails: bool,
    /// Not drained before this is set.
    may_go: Arc<AtomicBool>,
    ticks: Arc<Mutex<Vec<Instant>>>,
    next_tick: Option<Instant>,
}

impl Probe {
    fn new() -> Self {
        Self {
            bell: EventFd::new(EFD_NONBLOCK).unwrap(),
            handled: Arc::default(),
            greedy: false,
            fails: false,
            may_go: Arc::new(AtomicBool::new(true)),
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
        poll.add(self.bell.as_raw_fd(), 7, EventSet::IN)
    }

    fn handle(&mut self, token: u32, _events: EventSet, poll: &mut Poll<'_>) {
        assert_eq!(token, 7);
        let _ = self.bell.read();
        self.handled.fetch_add(1, Ordering::AcqRel);
        if self.greedy {
            poll.again(7);
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
        self.may_go.load(Ordering::Acquire)
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
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_greedy_engine_leaves_others_their_turn() {
    let worker = worker();
    let (mut greedy, modest) = (Probe::new(), Probe::new());
    greedy.greedy = true;
    let (count, bell) = (greedy.handled.clone(), greedy.bell.try_clone().unwrap());
    attach(&worker, greedy);
    bell.write(1).unwrap();
    eventually("greed", || count.load(Ordering::Acquire) > 1000);
    let (heard, bell) = (modest.handled.clone(), modest.bell.try_clone().unwrap());
    attach(&worker, modest);
    for turn in 1..20 {
        bell.write(1).unwrap();
        eventually("a turn", || heard.load(Ordering::Acquire) >= turn);
    }
    worker.stop(LIMIT).unwrap();
}

#[test]
fn init_runs_on_the_thread_before_anything_else() {
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
fn a_detached_engine_is_dropped_only_when_it_has_drained() {
    let worker = worker();
    let probe = Probe::new();
    let (may_go, handled) = (probe.may_go.clone(), probe.handled.clone());
    let bell = probe.bell.try_clone().unwrap();
    may_go.store(false, Ordering::Release);
    let leaving = attach(&worker, probe).detach();
    assert!(!leaving.wait(Duration::from_millis(50)));
    may_go.store(true, Ordering::Release);
    assert!(leaving.wait(LIMIT));
    // The duplicate of its bell is not polled any more.
    let before = handled.load(Ordering::Acquire);
    bell.write(1).unwrap();
    worker.handle().pause(LIMIT).unwrap();
    assert_eq!(handled.load(Ordering::Acquire), before);
}

#[test]
fn a_pause_that_cannot_be_is_answered_by_the_deadline_and_resume_still_works() {
    let worker = worker();
    let probe = Probe::new();
    let (may_go, handled) = (probe.may_go.clone(), probe.handled.clone());
    let bell = probe.bell.try_clone().unwrap();
    may_go.store(false, Ordering::Release);
    attach(&worker, probe);
    let limit = Duration::from_millis(50);
    let paused = worker.handle().pause(limit);
    assert!(matches!(paused, Err(WorkerError::Deadline { .. })));
    bell.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(handled.load(Ordering::Acquire), 0);
    may_go.store(true, Ordering::Release);
    worker.handle().pause(LIMIT).unwrap();
    worker.handle().resume().unwrap();
    eventually("the bell", || handled.load(Ordering::Acquire) == 1);
}

#[test]
fn ticks_come_when_they_are_due_and_not_again() {
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
fn an_engine_that_cannot_start_asks_for_a_reset() {
    let worker = worker();
    let interrupt = Arc::new(MockInterrupt::default());
    let mut probe = Probe::new();
    probe.fails = true;
    let attached = worker.handle().attach(Box::new(probe), interrupt.clone()).unwrap();
    eventually("reset wanted", || interrupt.reset_wanted.load(Ordering::Acquire));
    assert!(attached.detach().wait(LIMIT));
}

#[test]
fn orders_to_a_stopped_worker_fail_and_do_not_wait() {
    let worker = worker();
    let handle = worker.handle();
    let attached = attach(&worker, Probe::new());
    worker.stop(LIMIT).unwrap();
    assert!(matches!(handle.pause(LIMIT), Err(WorkerError::Stopped)));
    assert!(attached.detach().wait(LIMIT));
}
