//! Disks on the host: open, lock, read, write, flush, discard. Knows no virtio and no guest.
//!
//! ```text
//!   DiskOptions ──Disk::open──▶ Disk ──Engine::start──▶ Engine ──queue / submit──▶ Backend
//!   (plain data)                │ file, geometry,        │ ▲                        │ io_uring
//!                               │ image lock             │ └──reap: Completion──────┤ or threads
//!                               ▼                        ▼                          │ (± Faults)
//!                         /proc/locks, QEMU      event(): readable when ────────────┘
//!                                                completions wait
//! ```
//!
//! A [`Disk`] is an image that was opened, checked and locked; its metadata was read once and is kept,
//! so nothing can change it under a device but [`Disk::refresh_size`] and [`Disk::resize`]. An
//! [`Engine`] owns one disk and carries out [`Operation`]s on it. It has one owner, one thread at a
//! time, and no lock: whoever wants to switch a device to another image waits until nothing is in
//! flight and swaps the whole `Engine`.
//!
//! # Who answers for what
//!
//! - Offsets and lengths **originate with the guest**. The engine checks them against the disk and
//!   against overflow: any value yields a [`Completion`] with an error, never a panic, and no write
//!   grows an image.
//! - Memory is the caller's: it stays valid until the completion was handed out
//!   ([`Engine::queue`] is `unsafe` for that reason alone). Dropping an engine waits for what is in
//!   flight, so memory may go after it.
//! - Order is the caller's: operations in flight together may be carried out in any order; a flush
//!   covers what was completed before it was queued.
//! - A flush that failed cannot be repaired by another: without direct I/O the engine keeps failing
//!   flushes from then on, because Linux forgets what it could not write back.
//! - Limits and faults are the holder's of a [`Filters`] handle, a device's or a disk's: the former go with the device from
//!   disk to disk, the latter stay with the disk, whoever works on it. Whoever waits until nothing is in flight lifts the
//!   limits first ([`Engine::set_throttled`]).
//! - A disk may be given a volatile write cache ([`FaultOperation::VolatileCache`]): then a process that is killed loses
//!   what was not flushed, as a machine does that loses power. An engine that is dropped writes it first.
//! - Short transfers, `EINTR`, direct I/O's alignment and what a filesystem cannot do (holes, zeroes)
//!   are the engine's: the caller sees all or an error.
//!
//! # Formats
//!
//! Raw only, and never guessed. A raw image that begins like another format is refused unless the
//! caller says that it is raw: a guest may write any header into its own disk, so a guess would hand it
//! the host's files (a QCOW2 header names a backing file).

mod disk;
mod drive;
mod engine;
mod errno;
mod error;
mod event;
mod geometry;
mod lock;
mod options;
mod signature;

pub use disk::Disk;
pub use drive::{
    AttachError, AttachReason, CopyMode, Drive, Former, MirrorAction, MirrorError, MirrorEvent,
    MirrorOperation, MirrorOptions, MirrorRefusal, MirrorStatus, MirrorSync, OnError, Side,
};
pub use engine::fault::{Fault, Faults};
pub use engine::filter::Filters;
pub use engine::filter::fault::{FaultOperation, FaultRule, FaultStatus, MAX_DELAY, MAX_RULES, RuleError};
pub use engine::filter::throttle::{LimitsError, MAX_RATE, Rate, Rates, ThrottleLimits};
pub use engine::filter::volatile::MAX_UNFLUSHED;
pub use engine::{Buffer, CallKind, Completion, Engine, EngineKind, EngineOptions, Extent, Operation};
pub use errno::{Errno, UnknownErrno};
pub use error::{Holder, OpenError, ResizeError};
pub use geometry::Geometry;
pub use options::{Cache, DiskOptions, Format, Source};
