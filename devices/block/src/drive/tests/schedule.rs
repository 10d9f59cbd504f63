//! One random schedule: a guest, two devices that are made up, an owner who attaches, pauses, changes his mind and
//! finishes, and a clock. Everything follows from the seed.

#![expect(unsafe_code, reason = "hands memory to a drive, and scribbles on it as a guest would")]

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::Random;
use super::device::{Device, SECTOR, trace};
use crate::disk::Disk;
use crate::drive::Drive;
use crate::drive::mirror::{Bug, Kind, Limits};
use crate::drive::options::{
    CopyMode, MirrorAction, MirrorEvent, MirrorOperation, MirrorOptions, MirrorRefusal, MirrorSync, OnError,
};
use crate::engine::memory::Aligned;
use crate::engine::{Buffer, Engine, EngineKind, Operation};

/// What a schedule has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Verdict {
    /// It switched, all equal and durable.
    Switched,
    /// It kept the source, all equal and durable.
    Kept,
    /// The target was given up while it had something to do.
    GivenUp,
    /// The mirror has failed, as it was told to on errors.
    Failed,
    Diverged,
    NotDurable,
    Stuck,
    /// Something is left over of what was under way.
    Leftover,
    /// The guest was told of an error that the source did not have.
    GuestTold,
}

impl Verdict {
    pub(super) fn is_good(self) -> bool {
        matches!(self, Self::Switched | Self::Kept | Self::GivenUp | Self::Failed)
    }
}

/// Which modes a schedule is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Modes {
    Background,
    WriteBlocking,
    /// Changes at any time.
    Both,
    /// No mirror, but a backup.
    Backup,
}

/// Tokens of the guest's: no numbers that a mirror would use.
const TOKENS: u64 = 1 << 40;
const STEPS: u32 = 40_000;
/// From then on nothing fails.
const CALM: u32 = 6000;

struct Request {
    memory: Option<Aligned>,
    length: usize,
}

struct Schedule {
    random: Random,
    bug: Option<Bug>,
    modes: Modes,
    sectors: u64,
    /// Where the guest writes most.
    hot: u64,
    source: Device,
    target: Device,
    drive: Drive,
    now: Instant,
    requests: HashMap<u64, Request>,
    next: u64,
    left: u64,
    gate: bool,
    failed: bool,
    /// The target has direct I/O.
    direct: bool,
    finishing: bool,
    quiesced: bool,
    guest_errors: u64,
    /// The source when it was attached.
    snapshot: Vec<u8>,
}

pub(super) fn run(seed: u64, modes: Modes, bug: Option<Bug>) -> Verdict {
    let (mut schedule, target_is_zero) = prepare(seed, modes, bug);
    schedule.run(target_is_zero)
}

/// At some moment the target answers no more, and is given up.
pub(super) fn run_until_target_hangs(seed: u64, modes: Modes) -> Verdict {
    let (mut schedule, target_is_zero) = prepare(seed, modes, None);
    schedule.give_up(target_is_zero)
}

fn prepare(seed: u64, modes: Modes, bug: Option<Bug>) -> (Schedule, bool) {
    let mut random = Random::of(seed);
    let sectors = 5 + random.below(12);
    let bytes = usize::try_from(sectors).unwrap() * SECTOR;
    let device_source = random.percent(30);
    let target_is_zero = random.percent(50);
    let mut image = vec![0; bytes];
    for sector in image.chunks_mut(SECTOR) {
        if random.percent(60) {
            sector[0] = 1 + u8::try_from(random.below(200)).unwrap();
        }
    }
    let old = if target_is_zero { 0 } else { 0xaa };
    let source = Device::new("source", image, false, Random::of(seed ^ 1));
    let target = Device::new("target", vec![old; bytes], true, Random::of(seed ^ 2));
    let depth = random.among(&[2, 16, 16]);
    let disk = Disk::imagined(sectors * SECTOR as u64, device_source, random.percent(50));
    let drive = Drive::new(Engine::with_backend(disk, EngineKind::Threads, source.backend(), depth));
    let left = 6 + random.below(20);
    let hot = random.below(sectors);
    let schedule = Schedule {
        random,
        bug,
        modes,
        sectors,
        hot,
        source,
        target,
        drive,
        now: Instant::now(),
        requests: HashMap::new(),
        next: TOKENS,
        left,
        gate: false,
        failed: false,
        direct: true,
        finishing: false,
        quiesced: false,
        guest_errors: 0,
        snapshot: Vec::new(),
    };
    (schedule, target_is_zero)
}

impl Drop for Schedule {
    /// Engines wait for what is in flight when they are dropped.
    fn drop(&mut self) {
        self.exhaust();
    }
}

impl Schedule {
    fn exhaust(&self) {
        while self.source.is_busy() || self.target.is_busy() {
            self.source.step();
            self.target.step();
        }
    }

    fn run(&mut self, target_is_zero: bool) -> Verdict {
        let (mut step, source_fails) = (0, self.random.percent(40));
        let warm_up = self.random.below(60);
        (0..warm_up).for_each(|_| self.step(false));
        if !self.attach(target_is_zero) {
            return Verdict::Stuck;
        }
        self.target.set_failures(self.random.among(&[0, 3, 10]));
        self.source.set_failures(if source_fails { 6 } else { 0 });
        while !self.quiesced && !self.failed {
            step += 1;
            if step == CALM {
                self.source.set_failures(0);
                self.target.set_failures(0);
            }
            if step > STEPS {
                trace(|| format!("{:?}", self.drive.mirror_status()));
                return Verdict::Stuck;
            }
            self.step(true);
            if self.left == 0 || self.random.percent(1) {
                self.finish();
            }
        }
        let verdict = if self.failed { Verdict::Failed } else { self.compare() };
        if !verdict.is_good() || self.bug == Some(Bug::FinishWithoutDrain) {
            return verdict;
        }
        if !source_fails && self.guest_errors > 0 {
            return Verdict::GuestTold;
        }
        self.end(verdict)
    }

    fn give_up(&mut self, target_is_zero: bool) -> Verdict {
        if !self.attach(target_is_zero) {
            return Verdict::Stuck;
        }
        for _ in 0..self.random.below(400) {
            self.step(true);
            if self.random.percent(1) {
                self.finish();
            }
        }
        self.drive.reopen().unwrap();
        self.drive.give_up().unwrap();
        // The guest goes on, with no step of the target's.
        (self.gate, self.left) = (false, 8);
        for _ in 0..STEPS {
            self.request();
            self.source.step();
            self.reap();
            self.advance();
            if self.left == 0 && self.requests.is_empty() {
                break;
            }
        }
        if !self.requests.is_empty() {
            return Verdict::Stuck;
        }
        if self.guest_errors > 0 {
            return Verdict::GuestTold;
        }
        assert!(
            !(self.target.is_busy() && self.drive.is_left_to_the_guest()),
            "the target's work is forgotten"
        );
        let hung = self.target.is_busy();
        self.gate = true;
        let verdict = self.end(Verdict::Kept);
        if hung && verdict == Verdict::Kept { Verdict::GivenUp } else { verdict }
    }

    /// Anything that can happen, happens.
    fn step(&mut self, mirrored: bool) {
        match self.random.below(100) {
            0..58 => self.device().step(),
            58..70 => self.reap(),
            70..78 => self.advance(),
            78..90 => self.request(),
            90..96 => self.scribble(),
            _ if mirrored => self.interfere(),
            _ => {}
        }
    }

    fn device(&mut self) -> Device {
        let source = self.random.percent(50);
        match (source && self.source.is_busy()) || !self.target.is_busy() {
            true => self.source.clone(),
            false => self.target.clone(),
        }
    }

    fn attach(&mut self, target_is_zero: bool) -> bool {
        let undrained = self.bug == Some(Bug::AttachWithoutDrain);
        if !undrained && !self.drain() {
            return false;
        }
        let random = &mut self.random;
        let size = self.sectors * SECTOR as u64 + random.below(2) * 4096;
        let (direct, depth) = (random.percent(90), random.among(&[2, 16, 16]));
        self.direct = direct;
        let policies = [OnError::Ignore, OnError::Ignore, OnError::Stop, OnError::Enospc];
        let options = MirrorOptions {
            mode: match self.modes {
                Modes::Background | Modes::Backup => CopyMode::Background,
                Modes::WriteBlocking => CopyMode::WriteBlocking,
                Modes::Both => random.among(&[CopyMode::Background, CopyMode::WriteBlocking]),
            },
            granularity: random.among(&[512, 1024, 2048, 4096]),
            buf_size: random.among(&[1, 200_000, 16 << 20]),
            sync: MirrorSync::Full,
            speed: 0,
            unmap: random.percent(50),
            target_is_zero,
            on_source_error: random.among(&policies),
            on_target_error: random.among(&policies),
        };
        let limits = Limits {
            copies: 1 + random.index(5),
            piece: random.among(&[512, 1024, 2048, 1 << 20]),
            small_piece: random.among(&[512, 1024]),
            reach: random.among(&[512, 2048, 1 << 20]),
        };
        let disk = Disk::imagined(size, random.percent(20), direct);
        let target = Engine::with_backend(disk, EngineKind::Threads, self.target.backend(), depth);
        let kind = match self.modes {
            Modes::Backup => Kind::Backup { background: true },
            _ => Kind::Mirror,
        };
        if undrained {
            self.drive.install(kind, target, &options, limits);
        } else {
            self.drive.attach(kind, target, &options, limits).unwrap();
        }
        self.drive.mirror.as_mut().unwrap().core.bug = self.bug;
        self.gate = false;
        self.snapshot = self.source.image();
        true
    }

    /// Closes the gate and waits until nothing of the guest's is in flight.
    fn drain(&mut self) -> bool {
        self.gate = true;
        for _ in 0..STEPS {
            if self.drive.in_flight() == 0 && self.requests.is_empty() {
                return true;
            }
            self.device().step();
            self.reap();
            self.advance();
        }
        false
    }

    fn reap(&mut self) {
        let mut completions = Vec::new();
        self.drive.submit().unwrap();
        self.drive.reap(&mut completions).unwrap();
        for completion in completions {
            trace(|| format!("done {:x} {:?}", completion.token, completion.result));
            assert!(self.requests.remove(&completion.token).is_some(), "completed twice, or never asked for");
            self.guest_errors += u64::from(completion.result.is_err());
        }
        for event in self.drive.take_events() {
            trace(|| format!("{event:?}"));
            match event {
                MirrorEvent::Error { action: MirrorAction::Report, .. } => self.failed = true,
                // It will never succeed again.
                MirrorEvent::Error { error, .. }
                    if error.operation == MirrorOperation::Flush && !self.direct =>
                {
                    self.failed = true;
                }
                MirrorEvent::Quiesced => self.quiesced = true,
                MirrorEvent::Unfinished => {
                    // Let the guest go on, or try at once again.
                    (self.finishing, self.quiesced) = (false, false);
                    self.gate = self.random.percent(50);
                    self.drive.reopen().unwrap();
                }
                // A backup is complete.
                MirrorEvent::Ready => self.quiesced |= self.modes == Modes::Backup,
                MirrorEvent::Prepared | MirrorEvent::Error { .. } => {}
            }
        }
    }

    fn advance(&mut self) {
        self.now += Duration::from_millis(self.random.below(80));
        self.drive.advance(self.now).unwrap();
    }

    fn request(&mut self) {
        if self.gate || self.left == 0 || self.requests.len() > 7 {
            return;
        }
        let random = &mut self.random;
        let first = if random.percent(50) { self.hot } else { random.below(self.sectors) };
        let count = 1 + random.below((self.sectors - first).min(5));
        let (offset, length) = (first * SECTOR as u64, count * SECTOR as u64);
        let bytes = usize::try_from(length).unwrap();
        self.left -= 1;
        self.next += 1;
        let token = self.next;
        let memory = Aligned::new(bytes, SECTOR);
        let buffers: Vec<Buffer> = (0..usize::try_from(count).unwrap())
            .map(|i| Buffer::new(memory.base().wrapping_add(i * SECTOR), SECTOR))
            .collect();
        let kind = random.below(100);
        let data = kind < 68;
        if kind < 60 {
            buffers.iter().for_each(|buffer| store(buffer.base(), token));
        }
        let operation = match kind {
            0..68 => Operation::Write { offset, buffers },
            68..80 => Operation::WriteZeroes { offset, length, unmap: random.percent(50) },
            80..88 => Operation::Discard { offset, length },
            88..94 => Operation::Flush,
            _ => Operation::Read { offset, buffers },
        };
        self.requests.insert(token, Request { memory: Some(memory), length: if data { bytes } else { 0 } });
        trace(|| format!("request {token:x} {operation:?}"));
        // SAFETY: the memory is kept until the completion was reaped.
        unsafe { self.drive.queue(token, operation) };
    }

    /// The guest writes to memory that is being written to the disk.
    fn scribble(&mut self) {
        let mut tokens: Vec<_> =
            self.requests.iter().filter(|(_, request)| request.length > 0).map(|(t, _)| *t).collect();
        tokens.sort_unstable();
        if tokens.is_empty() {
            return;
        }
        let request = &self.requests[&self.random.among(&tokens)];
        let sector = self.random.index(request.length / SECTOR);
        if let Some(memory) = &request.memory {
            store(memory.base().wrapping_add(sector * SECTOR), self.random.below(u64::MAX) | 1);
        }
    }

    /// The owner does something to the mirror.
    fn interfere(&mut self) {
        let flip = self.modes == Modes::Both;
        let drive = &mut self.drive;
        match self.random.below(10) {
            0 => drive.pause(),
            1..6 => drive.resume(),
            6 => drive.set_speed(self.random.among(&[0, 1000, 1_000_000])),
            7 if flip => drive.set_mode(CopyMode::WriteBlocking),
            8 if flip => drive.set_mode(CopyMode::Background),
            9 => drive.prepare().or(Ok(())),
            _ => drive.set_speed(0),
        }
        .unwrap();
    }

    /// Holds the guest, and then asks for the end.
    fn finish(&mut self) {
        if self.modes == Modes::Backup {
            return self.drive.resume().unwrap();
        }
        self.gate = true;
        let idle = self.drive.in_flight() == 0 && self.requests.is_empty();
        if self.finishing || (!idle && self.bug != Some(Bug::FinishWithoutDrain)) {
            return;
        }
        let limit = self.random.among(&[0, 2048, u64::MAX]);
        match self.drive.finish(limit) {
            Ok(()) => self.finishing = true,
            Err(MirrorRefusal::NotConverged { .. }) => self.gate = self.left == 0,
            Err(MirrorRefusal::Paused) => self.drive.resume().unwrap(),
            Err(MirrorRefusal::Busy | MirrorRefusal::Failed(_)) => {}
            Err(other) => panic!("{other}"),
        }
    }

    fn compare(&self) -> Verdict {
        // With nothing of the guest's in flight, nothing is: this changes nothing, unless a drain is forgotten.
        self.exhaust();
        let target = self.target.image();
        let wanted = if self.modes == Modes::Backup { self.snapshot.clone() } else { self.source.image() };
        if wanted != target {
            let sectors = wanted.chunks(SECTOR).zip(target.chunks(SECTOR)).enumerate();
            for (sector, (source, target)) in sectors.filter(|(_, (source, target))| source != target) {
                trace(|| format!("sector {sector}: {:x?} {:x?}", &source[..8], &target[..8]));
            }
            Verdict::Diverged
        } else if self.target.durable() != target {
            Verdict::NotDurable
        } else if self.modes == Modes::Backup {
            Verdict::Kept
        } else if self.bug.is_none() && !self.drive.mirror.as_ref().unwrap().core.is_clean() {
            Verdict::Leftover
        } else if self.random_bit() {
            Verdict::Switched
        } else {
            Verdict::Kept
        }
    }

    fn random_bit(&self) -> bool {
        self.next.is_multiple_of(2)
    }

    /// Pivots or stays, and writes once more.
    fn end(&mut self, verdict: Verdict) -> Verdict {
        self.source.set_failures(0);
        self.target.set_failures(0);
        if verdict == Verdict::Failed && !self.drain() {
            return Verdict::Stuck;
        }
        let mut other = None;
        for _ in 0..STEPS {
            let result = if verdict == Verdict::Switched { self.drive.switch() } else { self.drive.detach() };
            match result {
                Ok(former) => {
                    other = Some(former.into_engine());
                    break;
                }
                Err(MirrorRefusal::Busy) => {
                    self.device().step();
                    self.reap();
                }
                Err(error) => panic!("{error}"),
            }
        }
        let Some(other) = other else { return Verdict::Stuck };
        if other.in_flight() > 0 || self.drive.in_flight() > 0 {
            return Verdict::Leftover;
        }
        let before = (self.source.image(), self.target.image());
        self.gate = false;
        self.left = 3;
        while self.left > 0 {
            self.request();
        }
        if !self.drain() {
            return Verdict::Stuck;
        }
        let changed = (self.source.image() != before.0, self.target.image() != before.1);
        match verdict {
            Verdict::Switched if changed.0 => Verdict::Diverged,
            Verdict::Kept | Verdict::Failed if changed.1 => Verdict::Diverged,
            good => good,
        }
    }
}

fn store(sector: *mut u8, value: u64) {
    // SAFETY: the first bytes of a sector of memory that is ours.
    unsafe { sector.cast::<u64>().write_unaligned(value) };
}
