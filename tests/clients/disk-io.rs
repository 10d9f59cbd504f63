//! Disk I/O for test guests: what busybox cannot do. One static program, no more than the standard library.
//!
//! ```text
//!   disk-io DEVICE run OP…                 one after the other; fails with the first that does
//!   disk-io DEVICE all OP…                 all at once
//!   disk-io DEVICE load SEED THREADS STOP  writes, reads and checks at random until the file STOP is there, then checks all
//!   disk-io DEVICE count THREADS SLOTS     numbered blocks without end; says `ack DEVICE THREAD NUMBER` when one is written
//!   disk-io DEVICE time r|w SPAN MS        4 KiB at random in the first SPAN bytes, one after the other, for so long; says
//!                                          how many, and in µs: median, 99th percentile, longest between two completions
//!
//!   OP   w:BYTE:OFFSET:LENGTH  write     r:BYTE:OFFSET:LENGTH  read, must be BYTE     z:OFFSET:LENGTH  write zeroes
//!        d:OFFSET:LENGTH       discard   f                     flush
//! ```
//!
//! OFFSET and LENGTH are multiples of 512 with `K` or `M` behind them or not. Nothing goes through the guest's page cache.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::error::Error;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

const SECTOR: usize = 512;
const O_DIRECT: i32 = 0o40000;
// linux/fs.h
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;

unsafe extern "C" {
    fn ioctl(fd: i32, request: u64, ...) -> i32;
}

/// Memory as O_DIRECT wants it.
struct Buffer(*mut u8, Layout);

impl Buffer {
    fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len.max(SECTOR), 4096).expect("a size");
        // SAFETY: the layout is not empty.
        let pointer = unsafe { alloc_zeroed(layout) };
        assert!(!pointer.is_null(), "no memory");
        Self(pointer, layout)
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: allocated with this size, initialized, ours alone.
        unsafe { std::slice::from_raw_parts(self.0, self.1.size()) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.0, self.1.size()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.0, self.1) }
    }
}

/// BLKDISCARD or BLKZEROOUT.
fn range(file: &File, request: u64, offset: u64, len: u64) -> std::io::Result<()> {
    let range = [offset, len];
    // SAFETY: both requests read two u64.
    match unsafe { ioctl(file.as_raw_fd(), request, range.as_ptr()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[derive(Clone, Copy)]
enum Op {
    Write(u8, u64, u64),
    Read(u8, u64, u64),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
}

impl Op {
    fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split(':').collect();
        Some(match parts[..] {
            ["w", byte, offset, len] => Self::Write(byte.parse().ok()?, number(offset)?, number(len)?),
            ["r", byte, offset, len] => Self::Read(byte.parse().ok()?, number(offset)?, number(len)?),
            ["z", offset, len] => Self::Zero(number(offset)?, number(len)?),
            ["d", offset, len] => Self::Discard(number(offset)?, number(len)?),
            ["f"] => Self::Flush,
            _ => return None,
        })
    }

    fn run(self, file: &File) -> Outcome {
        const CHUNK: u64 = 1 << 20;
        let chunks =
            |offset, len| (0..len).step_by(CHUNK as usize).map(move |at| (offset + at, CHUNK.min(len - at)));
        match self {
            Self::Write(byte, offset, len) => {
                let mut buffer = Buffer::new(CHUNK.min(len) as usize);
                buffer.fill(byte);
                for (at, len) in chunks(offset, len) {
                    file.write_all_at(&buffer[..len as usize], at)?;
                }
            }
            Self::Read(byte, offset, len) => {
                let mut buffer = Buffer::new(CHUNK.min(len) as usize);
                for (at, len) in chunks(offset, len) {
                    let bytes = &mut buffer[..len as usize];
                    file.read_exact_at(bytes, at)?;
                    if let Some(index) = bytes.iter().position(|found| *found != byte) {
                        return Err(
                            format!("at {}: {} in place of {byte}", at + index as u64, bytes[index]).into()
                        );
                    }
                }
            }
            Self::Zero(offset, len) => range(file, BLKZEROOUT, offset, len)?,
            Self::Discard(offset, len) => range(file, BLKDISCARD, offset, len)?,
            Self::Flush => file.sync_data()?,
        }
        Ok(())
    }
}

fn number(text: &str) -> Option<u64> {
    let (digits, scale) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 1 << 10),
        b'M' => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    digits.parse::<u64>().ok().map(|number| number * scale)
}

/// Runs the operations in threads of their own, if `at_once`.
fn run(file: &File, ops: &[String], at_once: bool) -> Outcome {
    let parse = |text: &String| Op::parse(text).ok_or_else(|| format!("what is {text}?"));
    let parsed = ops.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    if !at_once {
        return parsed.iter().try_for_each(|op| op.run(file));
    }
    thread::scope(|scope| {
        let threads: Vec<_> = parsed.iter().map(|op| scope.spawn(|| op.run(file))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }
}

/// What a sector should hold.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    Zero,
    /// Its number and this one, all over.
    Stamp(u64),
    /// What a discard has left.
    Unknown,
}

/// A sector's word, each different, so that a torn or misplaced sector is seen.
fn word(sector: u64, stamp: u64, index: usize) -> u64 {
    (sector << 20 ^ stamp).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index as u64)
}

/// One thread's part of the disk, and what it knows of it.
struct Part<'a> {
    file: &'a File,
    /// Its first sector.
    first: u64,
    contents: Vec<Content>,
    random: Random,
    stamp: u64,
    buffer: Buffer,
}

impl Part<'_> {
    const MOST: u64 = 128;

    fn step(&mut self) -> Outcome {
        let sectors = 1 + self.random.below(Self::MOST);
        let at = self.random.below(self.contents.len() as u64 - sectors);
        match self.random.below(100) {
            0..55 => self.write(at, sectors),
            55..80 => self.check(at, sectors),
            80..90 => self.clear(at, sectors, BLKZEROOUT, Content::Zero),
            90..95 => self.clear(at, sectors, BLKDISCARD, Content::Unknown),
            _ => Ok(self.file.sync_data()?),
        }
    }

    fn bytes(&mut self, sectors: u64) -> &mut [u8] {
        &mut self.buffer[..sectors as usize * SECTOR]
    }

    fn write(&mut self, at: u64, sectors: u64) -> Outcome {
        self.stamp += 1;
        let (first, stamp) = (self.first, self.stamp);
        for (sector, bytes) in (at..).zip(self.bytes(sectors).chunks_exact_mut(SECTOR)) {
            for (index, bytes) in bytes.chunks_exact_mut(8).enumerate() {
                bytes.copy_from_slice(&word(first + sector, stamp, index).to_le_bytes());
            }
        }
        self.file.write_all_at(&self.buffer[..sectors as usize * SECTOR], (first + at) * SECTOR as u64)?;
        self.contents[at as usize..(at + sectors) as usize].fill(Content::Stamp(stamp));
        Ok(())
    }

    fn clear(&mut self, at: u64, sectors: u64, how: u64, becomes: Content) -> Outcome {
        range(self.file, how, (self.first + at) * SECTOR as u64, sectors * SECTOR as u64)?;
        self.contents[at as usize..(at + sectors) as usize].fill(becomes);
        Ok(())
    }

    fn check(&mut self, at: u64, sectors: u64) -> Outcome {
        let (file, first) = (self.file, self.first);
        file.read_exact_at(self.bytes(sectors), (first + at) * SECTOR as u64)?;
        let found = self.buffer[..sectors as usize * SECTOR].chunks_exact(SECTOR);
        for ((sector, content), bytes) in (at..).zip(&self.contents[at as usize..]).zip(found) {
            let mut words =
                bytes.chunks_exact(8).map(|bytes| u64::from_le_bytes(bytes.try_into().expect("8 bytes")));
            let right = match content {
                Content::Zero => words.all(|word| word == 0),
                Content::Stamp(stamp) => {
                    words.enumerate().all(|(i, found)| found == word(first + sector, *stamp, i))
                }
                Content::Unknown => true,
            };
            if !right {
                let expected = match content {
                    Content::Stamp(stamp) => format!("write {stamp}, {:#x}", word(first + sector, *stamp, 0)),
                    _ => "zeroes".to_owned(),
                };
                let found: Vec<String> = bytes[..16].iter().map(|byte| format!("{byte:02x}")).collect();
                return Err(
                    format!("sector {}: {} in place of {expected}", first + sector, found.concat()).into()
                );
            }
        }
        Ok(())
    }

    fn check_all(&mut self) -> Outcome {
        let len = self.contents.len() as u64;
        (0..len).step_by(Self::MOST as usize).try_for_each(|at| self.check(at, Self::MOST.min(len - at)))
    }
}

/// A disk of zeroes under load.
fn load(mut file: &File, seed: u64, threads: u64, stop: &Path) -> Outcome {
    let sectors = file.seek(SeekFrom::End(0))? / SECTOR as u64 / threads;
    let (steps, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let work = |index: u64| {
        let mut part = Part {
            file,
            first: index * sectors,
            contents: vec![Content::Zero; sectors as usize],
            random: Random((seed * threads + index) << 8 | 1),
            stamp: 0,
            buffer: Buffer::new(Part::MOST as usize * SECTOR),
        };
        while !stop.exists() && !failed.load(Ordering::Relaxed) {
            part.step()?;
            steps.fetch_add(1, Ordering::Relaxed);
        }
        part.check_all()
    };
    thread::scope(|scope| {
        let (work, failed) = (&work, &failed);
        let threads: Vec<_> = (0..threads)
            .map(|index| {
                scope.spawn(move || {
                    let outcome = work(index);
                    failed.fetch_or(outcome.is_err(), Ordering::Relaxed);
                    outcome
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })?;
    println!("{}", steps.into_inner());
    Ok(())
}

/// Block `NUMBER % slots` of each thread's own gets NUMBER all over, from 1 on.
fn count(file: &File, device: &str, threads: u64, slots: u64) -> Outcome {
    const BLOCK: usize = 4096;
    thread::scope(|scope| {
        let work = |index: u64| -> Outcome {
            let mut buffer = Buffer::new(BLOCK);
            for number in 1_u64.. {
                buffer.chunks_exact_mut(8).for_each(|bytes| bytes.copy_from_slice(&number.to_le_bytes()));
                file.write_all_at(&buffer, (index * slots + number % slots) * BLOCK as u64)?;
                std::io::stdout().write_all(format!("ack {device} {index} {number}\n").as_bytes())?;
            }
            Ok(())
        };
        let threads: Vec<_> = (0..threads).map(|index| scope.spawn(move || work(index))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })
}

/// What a guest sees of its disk, at a depth of one.
fn time(file: &File, write: bool, span: u64, time: Duration) -> Outcome {
    const BLOCK: u64 = 4096;
    /// Starting a program disturbs a guest.
    const SETTLE: Duration = Duration::from_millis(100);
    let (mut buffer, mut random) = (Buffer::new(BLOCK as usize), Random(0x7461_726e));
    buffer.fill(0xa5);
    let (mut latencies, mut gap) = (Vec::with_capacity(1 << 20), Duration::ZERO);
    let start = Instant::now();
    let mut last = start;
    while last.duration_since(start) < SETTLE + time {
        let offset = random.below(span / BLOCK) * BLOCK;
        let begin = Instant::now();
        if write {
            file.write_all_at(&buffer, offset)?;
        } else {
            file.read_exact_at(&mut buffer, offset)?;
        }
        let end = Instant::now();
        if begin.duration_since(start) >= SETTLE {
            latencies.push(end - begin);
            gap = gap.max(end - last);
        }
        last = end;
    }
    latencies.sort_unstable();
    let percentile = |percent: usize| latencies.get(latencies.len() * percent / 100).copied().unwrap_or(gap);
    let [median, tail, gap] = [percentile(50), percentile(99), gap].map(|time| time.as_nanos() as f64 / 1e3);
    println!("{} {median:.1} {tail:.1} {gap:.1}", latencies.len());
    Ok(())
}

fn work(args: &[String]) -> Outcome {
    let usage = "disk-io DEVICE run|all|load|count|time …";
    let [device, verb, rest @ ..] = args else { return Err(usage.into()) };
    let file = File::options().read(true).write(true).custom_flags(O_DIRECT).open(device)?;
    match (verb.as_str(), rest) {
        ("run", ops) => run(&file, ops, false),
        ("all", ops) => run(&file, ops, true),
        ("load", [seed, threads, stop]) => load(&file, seed.parse()?, threads.parse()?, Path::new(stop)),
        ("count", [threads, slots]) => {
            let name = device.rsplit('/').next().unwrap_or_default();
            count(&file, name, threads.parse()?, slots.parse()?)
        }
        ("time", [way, span, ms]) if ["r", "w"].contains(&way.as_str()) => {
            let span = number(span).ok_or(usage)?;
            time(&file, way == "w", span, Duration::from_millis(ms.parse()?))
        }
        _ => Err(usage.into()),
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match work(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("disk-io: {error}");
            ExitCode::FAILURE
        }
    }
}
