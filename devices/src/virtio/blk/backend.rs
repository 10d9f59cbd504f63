//! The disk's side that outlives machines: its owner's handle, and the way to its thread.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use block::{
    Disk, Drive, Engine, EngineKind, EngineOptions, Errno, Filters, Geometry, MirrorOptions, MirrorStatus,
    ResizeError,
};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use super::Blk;
use super::mirroring::{MirrorOrder, Purpose};
use super::policy::{DiskEvent, ErrorPolicy, EventSink};
use super::request::ID_BYTES;
use super::statistics::{BlkStatistics, Counters};
use super::worker::Worker;
use crate::virtio::device::Activation;

/// How long a disk's thread may take to end. Then it is left behind with what it owns.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// More queues than any guest of ours has vCPUs.
const MAX_QUEUES: u16 = 32;

/// What a disk is to its guest.
#[derive(Debug, Clone)]
pub struct BlkOptions {
    /// Names the disk in events, messages and its thread.
    pub id: String,
    /// What the guest sees as the disk's serial number: up to 20 printable ASCII characters, may be
    /// empty.
    pub serial: String,
    /// Request queues, 1–32; one thread serves them all.
    pub queues: u16,
    /// On errors of reads.
    pub read_error: ErrorPolicy,
    /// On errors of everything else.
    pub write_error: ErrorPolicy,
    /// Who makes the system calls.
    pub engine: EngineOptions,
}

impl BlkOptions {
    /// One queue, no serial, QEMU's policies: read errors are reported, a full disk stops the VM.
    pub fn new(id: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            serial: String::new(),
            queues: 1,
            read_error: ErrorPolicy::Report,
            write_error: ErrorPolicy::Enospc,
            engine: EngineOptions::default(),
        }
    }
}

/// A disk cannot be put to work.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The options contradict themselves.
    #[error("Disk '{id}': {reason}")]
    Option {
        /// The disk.
        id: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The host has no ring, no thread or no descriptor left.
    #[error("Cannot start the I/O thread of disk '{id}'")]
    Host {
        /// The disk.
        id: String,
        /// What the host said.
        source: io::Error,
    },
}

/// A disk did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// No answer in time. The command is still under way.
    #[error("Disk '{disk}' has not answered '{command}' for {} s", waited.as_secs())]
    Timeout {
        /// The disk.
        disk: Arc<str>,
        /// What it was told.
        command: &'static str,
        /// How long.
        waited: Duration,
    },
    /// The thread has ended, or another command has overtaken this one (a resume, a pause).
    #[error("Disk '{disk}' has dropped '{command}'")]
    Dropped {
        /// The disk.
        disk: Arc<str>,
        /// What it was told.
        command: &'static str,
    },
    /// Data may not have reached the disk.
    #[error("Disk '{disk}' cannot be flushed")]
    Flush {
        /// The disk.
        disk: Arc<str>,
        /// What the host said.
        source: Errno,
    },
    /// The size stays as it was.
    #[error("Disk '{disk}' cannot be resized")]
    Resize {
        /// The disk.
        disk: Arc<str>,
        /// Why.
        source: ResizeError,
    },
    /// There is no mirror, or not as asked; the target is closed again.
    #[error("Disk '{disk}' cannot be mirrored")]
    Attach {
        /// The disk.
        disk: Arc<str>,
        /// Why.
        source: block::AttachReason,
    },
    /// The mirror does not do what it is told.
    #[error("Disk '{disk}': the mirror refuses")]
    Mirror {
        /// The disk.
        disk: Arc<str>,
        /// Why.
        source: block::MirrorRefusal,
    },
    /// Another machine's device uses the disk.
    #[error("Disk '{disk}' is in use by another device")]
    Busy {
        /// The disk.
        disk: Arc<str>,
    },
    /// The thread cannot listen to doorbells.
    #[error("Disk '{disk}' cannot watch its queues")]
    Watch {
        /// The disk.
        disk: Arc<str>,
        /// What the host said.
        source: io::Error,
    },
}

/// How a thread answers a command.
pub(super) type Reply<T> = mpsc::SyncSender<Result<T, BlkError>>;

/// An answer to come.
#[must_use = "the command's outcome is known only here"]
#[derive(Debug)]
pub struct Ticket<T> {
    disk: Arc<str>,
    command: &'static str,
    answer: mpsc::Receiver<Result<T, BlkError>>,
}

impl<T> Ticket<T> {
    /// Waits for the answer.
    ///
    /// # Errors
    ///
    /// The command's own, [`BlkError::Timeout`] or [`BlkError::Dropped`].
    pub fn wait(self, timeout: Duration) -> Result<T, BlkError> {
        let Self { disk, command, answer } = self;
        match answer.recv_timeout(timeout) {
            Ok(answer) => answer,
            Err(mpsc::RecvTimeoutError::Timeout) => Err(BlkError::Timeout { disk, command, waited: timeout }),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(BlkError::Dropped { disk, command }),
        }
    }
}

/// What a disk's thread can be told.
pub(super) enum Command {
    Activate { owner: u64, activation: Activation, reply: Reply<()> },
    Deactivate { owner: u64, reply: Reply<()> },
    Pause { reply: Reply<()> },
    Resume { reply: Reply<()> },
    Flush { reply: Reply<()> },
    Resize { size: Option<u64>, reply: Reply<u64> },
    StartCopy { purpose: Purpose, target: Box<Engine>, options: MirrorOptions, reply: Reply<()> },
    Mirror { order: MirrorOrder, reply: Reply<()> },
    Hold { reply: Reply<()> },
    LetGo,
    Stop,
}

/// Facts that do not change while the disk is in use.
#[derive(Debug, Clone)]
pub struct BlkFacts {
    /// Names the disk.
    pub id: Arc<str>,
    /// Path of the image, or the name of its descriptor.
    pub image: String,
    /// Nothing is ever written.
    pub read_only: bool,
    /// The host's page cache is bypassed.
    pub direct: bool,
    /// When writes are durable.
    pub cache: block::Cache,
    /// Discarded ranges go back to the host.
    pub discard: bool,
    /// Block sizes and alignment.
    pub geometry: Geometry,
    /// Who makes the system calls.
    pub engine: EngineKind,
    /// Request queues.
    pub queues: u16,
    /// The handle on the limits and faults of the image, if it has one.
    pub node_filters: Option<Filters>,
}

impl BlkFacts {
    pub(super) fn of(drive: &Drive, id: Arc<str>, queues: u16) -> Self {
        let disk = drive.disk();
        Self {
            id,
            image: disk.name().to_owned(),
            read_only: disk.is_read_only(),
            direct: disk.is_direct(),
            cache: disk.cache(),
            discard: disk.discards(),
            geometry: *disk.geometry(),
            engine: drive.kind(),
            queues,
            node_filters: drive.node_filters().cloned(),
        }
    }
}

/// What the owner, the devices and the thread of a disk share.
pub(super) struct Link {
    /// As the disk was put to work: what the guest sees stays so, whatever image is below.
    pub(super) facts: BlkFacts,
    /// As it is now.
    pub(super) current: Mutex<BlkFacts>,
    /// Where its mirror stands, as of the last round of work.
    pub(super) mirror: Mutex<Option<MirrorStatus>>,
    /// How long the guest was held for the end of the last one.
    pub(super) held: Mutex<Option<Duration>>,
    pub(super) counters: Counters,
    /// In bytes.
    pub(super) size: AtomicU64,
    /// An error has stopped the disk, and nothing has let it go on since.
    pub(super) stopped: Arc<AtomicBool>,
    /// Readable when there are commands.
    pub(super) wake: EventFd,
    commands: mpsc::Sender<Command>,
    next_owner: AtomicU64,
}

impl Link {
    /// Tells the thread something.
    pub(super) fn tell<T>(&self, command: &'static str, make: impl FnOnce(Reply<T>) -> Command) -> Ticket<T> {
        let (reply, answer) = mpsc::sync_channel(1);
        // A thread that has ended drops the reply, which the ticket finds out.
        self.order(make(reply));
        Ticket { disk: Arc::clone(&self.facts.id), command, answer }
    }

    /// Tells the thread something that it does not answer.
    pub(super) fn order(&self, command: Command) {
        let _ = self.commands.send(command);
        // Fails only when the counter is full, and then the thread has been woken already.
        let _ = self.wake.write(1);
    }
}

/// A disk at work, for as long as a VM has it: across resets and reboots, each of which makes a new
/// [`Blk`] of it. Dropping it waits for requests in flight and ends the thread.
pub struct BlkBackend {
    pub(super) link: Arc<Link>,
    thread: Option<JoinHandle<()>>,
    /// Disconnected when the thread is about to end.
    ended: mpsc::Receiver<()>,
    pub(super) filters: Option<Filters>,
}

impl BlkBackend {
    /// Starts the disk's thread, `blk-<id>`. `on_event` is called on that thread and must not block.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub fn start(
        disk: Disk,
        options: BlkOptions,
        on_event: impl Fn(DiskEvent) + Send + 'static,
    ) -> Result<Self, StartError> {
        check(&options)?;
        let BlkOptions { id, serial, queues, read_error, write_error, engine } = options;
        let failed = |source| StartError::Host { id: id.clone(), source };
        let size = AtomicU64::new(disk.size());
        let wanted = engine.kind;
        let filters = engine.filters.clone();
        let engine = Engine::start(disk, &engine).map_err(failed)?;
        if wanted.is_none() && engine.kind() == EngineKind::Threads {
            tracing::info!(disk = id, "The host does not allow io_uring; the disk uses threads");
        }
        let drive = Drive::new(engine);
        let facts = BlkFacts::of(&drive, id.as_str().into(), queues);
        let mut id_bytes = [0; ID_BYTES];
        id_bytes[..serial.len()].copy_from_slice(serial.as_bytes());
        let (commands, receiver) = mpsc::channel();
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed)?;
        let counters = Counters::default();
        let stopped = Arc::new(AtomicBool::new(false));
        let link = Arc::new(Link {
            current: Mutex::new(facts.clone()),
            facts,
            mirror: Mutex::new(None),
            held: Mutex::new(None),
            counters,
            size,
            stopped: Arc::clone(&stopped),
            wake,
            commands,
            next_owner: AtomicU64::new(0),
        });

        let worker = Worker {
            serial: id_bytes,
            policies: (read_error, write_error),
            events: EventSink::new(Box::new(on_event), stopped),
            commands: receiver,
            drive,
        };
        let running = worker.prepare(Arc::clone(&link)).map_err(failed)?;
        let (end, ended) = mpsc::sync_channel(0);
        let body = move || {
            let _end = end;
            running.run();
        };
        let thread = thread::Builder::new().name(format!("blk-{id}")).spawn(body).map_err(failed)?;
        Ok(Self { link, thread: Some(thread), ended, filters })
    }

    /// A device on this disk, for one machine. Only one at a time can be activated.
    pub fn device(&self) -> Blk {
        let owner = self.link.next_owner.fetch_add(1, Ordering::Relaxed);
        Blk::new(Arc::clone(&self.link), owner)
    }

    /// Its name.
    pub fn id(&self) -> &Arc<str> {
        &self.link.facts.id
    }

    /// What it is now; a switch to another image changes it.
    pub fn facts(&self) -> BlkFacts {
        self.link.current.lock().clone()
    }

    /// The handle on its limits and faults, if its options had one. They are the device's and stay when its image changes;
    /// an image's own go with it, see [`BlkFacts::node_filters`].
    pub fn filters(&self) -> Option<&Filters> {
        self.filters.as_ref()
    }

    /// Bytes in a logical block as the guest sees it, which stays so whatever image is below.
    pub fn block_size(&self) -> u32 {
        self.link.facts.geometry.logical_block_size
    }

    /// The disk's size in bytes.
    pub fn size(&self) -> u64 {
        self.link.size.load(Ordering::Acquire)
    }

    /// Whether an error has stopped it and nothing has let it go on since: an event that says so may be late.
    pub fn is_stopped(&self) -> bool {
        self.link.stopped.load(Ordering::Acquire)
    }

    /// What it has done.
    pub fn statistics(&self) -> BlkStatistics {
        self.link.counters.read()
    }

    /// Takes no requests any more, finishes those in flight, and makes everything durable. Stays so,
    /// also when the flush fails, until it is resumed.
    pub fn pause(&self) -> Ticket<()> {
        self.link.tell("pause", |reply| Command::Pause { reply })
    }

    /// Goes on after a pause or an error, with the held requests first.
    pub fn resume(&self) -> Ticket<()> {
        self.link.tell("resume", |reply| Command::Resume { reply })
    }

    /// Makes completed writes durable.
    pub fn flush(&self) -> Ticket<()> {
        self.link.tell("flush", |reply| Command::Flush { reply })
    }

    /// Changes the size, in bytes, while nothing is in flight, and tells the guest. The answer is the
    /// new size.
    pub fn resize(&self, size: u64) -> Ticket<u64> {
        self.link.tell("resize", |reply| Command::Resize { size: Some(size), reply })
    }

    /// How long the guest's requests waited for the end of the last mirror, as far as they had to.
    pub fn held(&self) -> Option<Duration> {
        *self.link.held.lock()
    }

    /// Learns a size that was changed from outside, and tells the guest. The answer is the new size.
    pub fn refresh_size(&self) -> Ticket<u64> {
        self.link.tell("refresh", |reply| Command::Resize { size: None, reply })
    }
}

impl Drop for BlkBackend {
    fn drop(&mut self) {
        self.link.order(Command::Stop);
        if let Err(mpsc::RecvTimeoutError::Timeout) = self.ended.recv_timeout(STOP_TIMEOUT) {
            // The thread owns what the kernel still works with: the image and the guest's memory.
            tracing::error!(disk = %self.link.facts.id, "Disk I/O does not end; its thread is left behind");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(disk = %self.link.facts.id, "The disk's thread has panicked");
        }
    }
}

fn check(options: &BlkOptions) -> Result<(), StartError> {
    let BlkOptions { id, serial, queues, .. } = options;
    let wrong = |reason| Err(StartError::Option { id: id.clone(), reason });
    if id.is_empty() || id.contains('\0') {
        return wrong("a disk's ID must not be empty or contain a zero byte");
    }
    if serial.len() > ID_BYTES || !serial.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ') {
        return wrong("a serial number has up to 20 printable ASCII characters");
    }
    if !(1..=MAX_QUEUES).contains(queues) {
        return wrong("a disk has 1 to 32 queues");
    }
    Ok(())
}
