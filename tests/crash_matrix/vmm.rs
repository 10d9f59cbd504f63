//! A VMM without a guest: everything a pivot passes through but KVM.
//!
//! ```text
//!   monitor socket ─▶ Monitor ─▶ Machine (monitor::Vm): Jobs ─▶ BlkBackend, one thread per disk ─▶ images
//!   stdin ──────────▶ bursts ──▶ Guest ─▶ FakeDriver ─▶ virtqueues ──────────▲
//! ```
//!
//! It ends when its standard input does.

use std::collections::{HashMap, HashSet};
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, Write, stdin, stdout};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use block::{Disk, DiskOptions, EngineOptions, FaultOperation, FaultRule, Filters, Format};
use devices::testing::FakeDriver;
use devices::virtio::blk::{BlkBackend, BlkOptions, DiskEvent, ErrorPolicy};
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm::event_loop::{Interest, Registrations, Token, Watch, ready};
use vmm::jobs::Jobs;
use vmm::jobs::nodes::{NodeSource, NodeSpec, Nodes};
use vmm::machine::notify::{self, Inbox, Notifier, VmEvent};
use vmm::monitor::{Monitor, SessionId, pivot_info};
use vmm::pauses::Pauses;
use vmm::run_state::RunState;

use crate::agent;
use crate::guest::Guest;
use crate::machine::Machine;
use crate::setup::{Setup, is_target};

type Failure = Box<dyn Error>;

/// Plays the VMM until standard input ends, or until a client ends it.
pub(crate) fn run(setup: &Setup) -> Result<(), Failure> {
    let (events, inbox) = notify::channel()?;
    let mut log = OpenOptions::new().create(true).append(true).open(setup.log())?;
    let mut disks = Vec::new();
    let mut specs = Vec::new();
    for index in 0..setup.recipe.disks {
        let path = boot_image(setup, index);
        let (backend, spec) = open(setup, index, &path, &events)?;
        tell_root(&mut log, index, is_target(&path));
        disks.push(backend);
        specs.push((None, spec));
    }
    let drivers = disks.iter().map(|disk| FakeDriver::new(Box::new(disk.device())));
    let mut drivers: Vec<_> = drivers.collect();
    for driver in &mut drivers {
        driver.start(u64::MAX);
    }
    let guest = Guest::start(drivers, log.try_clone()?, setup.seed)?;
    agent::start(setup, Arc::clone(&guest.frozen))?;
    let bursts = guest.bursts();
    // So that there is something to copy.
    bursts(40);
    thread::Builder::new().name("stdin".into()).spawn(move || serve_bursts(&bursts))?;

    let count = disks.len();
    let machine = Machine {
        jobs: Jobs::new(Nodes::new(specs), count, events.for_jobs()),
        disks,
        guest,
        log,
        state: RunState::Running,
        pauses: Pauses::default(),
        events: Vec::new(),
        quit: false,
        equipped: HashSet::new(),
        setup: setup.clone(),
    };
    let mut early = Early::default();
    let monitor = Monitor::bind(&setup.monitor(), &mut early)?;
    let control = ControlLoop { machine, monitor, inbox, known: early.0 };
    let mut manager =
        EventManager::<ControlLoop>::new_with_capacity(16).map_err(|error| error.to_string())?;
    let id = manager.add_subscriber(control);
    println!("ready");
    stdout().flush()?;
    while !manager.subscriber_mut(id).map_err(|error| error.to_string())?.machine.quit {
        manager.run().map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// The image that a disk has: the durable configuration knows.
fn boot_image(setup: &Setup, index: usize) -> std::path::PathBuf {
    let source = setup.source(index);
    let disks = coordinator::disks::DurableDisks::load(&setup.state()).unwrap_or_default();
    disks.successor(&Setup::disk(index), &source).map_or(source.clone(), |found| found.by.path.clone())
}

fn open(
    setup: &Setup,
    index: usize,
    path: &Path,
    events: &Notifier,
) -> Result<(BlkBackend, NodeSpec), Failure> {
    let filters = Filters::new()?;
    if setup.power {
        filters.add_fault(volatile(setup.seed))?;
    }
    let disk = Disk::open(DiskOptions { format: Some(Format::Raw), ..DiskOptions::path(path) })?;
    let engine = EngineOptions {
        kind: setup.engine(),
        node_filters: Some(filters.clone()),
        ..EngineOptions::default()
    };
    let options =
        BlkOptions { write_error: ErrorPolicy::Report, engine, ..BlkOptions::new(Setup::disk(index)) };
    let events = events.clone();
    let backend = BlkBackend::start(disk, options, move |event| events.post(VmEvent::Disk(event)))?;
    let source = NodeSource::Path(path.to_owned());
    Ok((backend, NodeSpec { filters: Some(filters), engine: setup.engine(), ..NodeSpec::new(source) }))
}

/// The cache whose content dies with this process.
pub(crate) fn volatile(seed: u64) -> FaultRule {
    FaultRule { seed: Some(seed), ..FaultRule::new(FaultOperation::VolatileCache) }
}

/// Each line asks for so many writes; an answer follows when they are flushed. The end is the end of this process.
#[expect(clippy::disallowed_methods, clippy::exit, reason = "whoever started this is gone")]
fn serve_bursts(burst: &dyn Fn(usize)) {
    for line in stdin().lock().lines().map_while(Result::ok) {
        burst(line.parse().unwrap_or(0));
        println!("done");
        let _ = stdout().flush();
    }
    std::process::exit(0);
}

/// The one subscriber of the loop.
struct ControlLoop {
    machine: Machine,
    monitor: Monitor,
    inbox: Inbox,
    known: HashMap<RawFd, (Token, Interest)>,
}

impl MutEventSubscriber for ControlLoop {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let mut known = HashMap::new();
        for (fd, (token, interest)) in std::mem::take(&mut self.known) {
            Registrations::new(ops, &mut known).set(fd, token, interest);
        }
        let wake = self.inbox.wake().as_raw_fd();
        Registrations::new(ops, &mut known).set(wake, Token::VmEvent, Interest::READ);
        self.known = known;
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let mut known = std::mem::take(&mut self.known);
        let watch = &mut Registrations::new(ops, &mut known);
        match Token::unpack(events.data()) {
            Some(Token::VmEvent) => self.vm_events(),
            Some(token) => {
                let now = Instant::now();
                self.monitor.ready(token, ready(events.event_set()), &mut self.machine, now, watch);
            }
            None => {}
        }
        self.settle(watch);
        self.known = known;
    }
}

impl ControlLoop {
    fn vm_events(&mut self) {
        while let Some(event) = self.inbox.take_next() {
            match event {
                VmEvent::Disk(DiskEvent::Mirror { disk, report }) => self.machine.hear(&disk, report),
                VmEvent::Job(done) => self.machine.jobs.done(&self.machine.disks, done),
                VmEvent::Disk(DiskEvent::IoError { .. }) | VmEvent::Vcpu { .. } => {}
            }
        }
    }

    /// As the real loop does it: what had to wait, then events, then answers.
    fn settle(&mut self, watch: &mut dyn Watch) {
        let now = Instant::now();
        loop {
            self.machine.jobs.settle(&self.machine.disks);
            self.machine.look_at_roots();
            let mut events = std::mem::take(&mut self.machine.events);
            events.append(&mut self.machine.jobs.take_events());
            let answers = self.machine.jobs.take_answers();
            if events.is_empty() && answers.is_empty() {
                break;
            }
            for event in events {
                self.monitor.emit(&event, &mut self.machine, now, watch);
            }
            for (session, result) in answers {
                let result = result.map(|info| pivot_info(&info));
                self.monitor.complete(SessionId(session), result, &mut self.machine, now, watch);
            }
        }
        if self.monitor.next_deadline().is_some_and(|deadline| deadline <= now + Duration::from_millis(1)) {
            self.monitor.tick(&mut self.machine, now, watch);
        }
    }
}

/// In one piece: the guest writes there, too.
fn tell_root(log: &mut File, index: usize, on_target: bool) {
    let line = format!("R {index} {}\n", u8::from(on_target));
    log.write_all(line.as_bytes()).expect("a log");
}

impl Machine {
    /// Tells log and guest which image each disk works on.
    fn look_at_roots(&mut self) {
        for index in 0..self.disks.len() {
            let root = self.jobs.nodes.root(index);
            let on_target = root.is_some_and(|root| is_target(Path::new(&root.filename)));
            if self.guest.on_target[index].swap(on_target, Ordering::SeqCst) != on_target {
                tell_root(&mut self.log, index, on_target);
            }
        }
    }
}

/// Registrations made before the loop is there.
#[derive(Default)]
struct Early(HashMap<RawFd, (Token, Interest)>);

impl Watch for Early {
    fn set(&mut self, fd: RawFd, token: Token, interest: Interest) {
        self.0.insert(fd, (token, interest));
    }

    fn remove(&mut self, fd: RawFd) {
        self.0.remove(&fd);
    }
}
