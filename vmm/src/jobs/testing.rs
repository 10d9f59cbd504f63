//! Disks that do what they are told only on paper.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use block::{CopyMode, Disk, EngineOptions, MirrorOptions, MirrorStatus};

use super::disks::{Answer, DiskFacts, Disks, Held, NotDone};
use super::lifecycle::Order;

/// Two disks, `disk0` and `disk1`, of [`SIZE`] bytes.
#[derive(Default)]
pub struct FakeDisks(RefCell<State>);

/// Size of each disk in bytes.
pub const SIZE: u64 = 64 << 10;

#[derive(Default)]
struct State {
    targets: [Option<Disk>; 2],
    options: Option<MirrorOptions>,
    /// What was held, attached and let go.
    log: Rc<RefCell<Vec<String>>>,
    orders: Vec<(usize, Order)>,
    progress: (u64, u64),
    /// Until nothing remains, and of a pivot's hold.
    estimates: (Option<Duration>, Option<Duration>),
    /// What the next order to end is answered with.
    failure: Option<NotDone>,
    /// What the next start is.
    refusal: Option<NotDone>,
    /// What the next backup of that disk is.
    refused: Option<(usize, NotDone)>,
}

impl FakeDisks {
    /// Orders since the last call, as text.
    pub fn orders(&self) -> Vec<String> {
        let orders = std::mem::take(&mut self.0.borrow_mut().orders);
        orders.iter().map(|(disk, order)| format!("{disk} {order:?}")).collect()
    }

    /// What was held, attached and let go since the last call.
    pub fn moments(&self) -> Vec<String> {
        std::mem::take(&mut self.0.borrow().log.borrow_mut())
    }

    /// How the last mirror or backup was asked for.
    pub fn options(&self) -> MirrorOptions {
        self.0.borrow().options.clone().unwrap()
    }

    /// Bytes done and bytes in all, of every mirror.
    pub fn progress(&self, done: u64, total: u64) {
        self.0.borrow_mut().progress = (done, total);
    }

    /// What is to be expected of every mirror: until nothing remains, and of a pivot's hold.
    pub fn expect(&self, remaining: Option<Duration>, hold: Option<Duration>) {
        self.0.borrow_mut().estimates = (remaining, hold);
    }

    /// The next end fails.
    pub fn fail_end(&self, error: NotDone) {
        self.0.borrow_mut().failure = Some(error);
    }

    /// The next mirror or backup does not begin.
    pub fn refuse_start(&self, error: NotDone) {
        self.0.borrow_mut().refusal = Some(error);
    }

    /// The next backup of this disk does not begin.
    pub fn refuse_backup(&self, disk: usize, error: NotDone) {
        self.0.borrow_mut().refused = Some((disk, error));
    }

    fn start(&self, disk: usize, target: Disk, options: MirrorOptions) -> Result<(), NotDone> {
        let mut state = self.0.borrow_mut();
        if let Some(error) = state.refusal.take() {
            return Err(error);
        }
        assert!(state.targets[disk].is_none());
        state.targets[disk] = Some(target);
        state.options = Some(options);
        Ok(())
    }
}

/// Logs its end.
struct Hold(Rc<RefCell<Vec<String>>>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.borrow_mut().push("let go".into());
    }
}

impl Disks for FakeDisks {
    fn count(&self) -> usize {
        2
    }

    fn facts(&self, disk: usize) -> DiskFacts {
        DiskFacts { device: format!("disk{disk}"), size: SIZE, block_size: 512 }
    }

    fn start_mirror(
        &self,
        disk: usize,
        target: Disk,
        _: EngineOptions,
        options: MirrorOptions,
    ) -> Result<(), NotDone> {
        self.start(disk, target, options)
    }

    fn start_backup(
        &self,
        disk: usize,
        target: Disk,
        _: EngineOptions,
        options: MirrorOptions,
    ) -> Result<(), NotDone> {
        self.0.borrow().log.borrow_mut().push(format!("attach {disk}"));
        let refused = self.0.borrow_mut().refused.take_if(|(of, _)| *of == disk);
        refused.map_or(Ok(()), |(_, error)| Err(error))?;
        self.start(disk, target, options)
    }

    fn hold(&self, disks: &[usize]) -> Result<Held, NotDone> {
        let log = Rc::clone(&self.0.borrow().log);
        log.borrow_mut().push(format!("hold {disks:?}"));
        Ok(Box::new(Hold(log)))
    }

    fn order(&self, disk: usize, order: Order) -> Answer {
        let mut state = self.0.borrow_mut();
        assert!(state.targets[disk].is_some(), "{order:?} without a mirror");
        state.orders.push((disk, order));
        if !matches!(order, Order::Switch | Order::Detach) {
            return Box::new(|| Ok(()));
        }
        if let Some(error) = state.failure.take() {
            return Box::new(|| Err(error));
        }
        // Either image is closed: it can be opened again.
        state.targets[disk] = None;
        Box::new(|| Ok(()))
    }

    fn held(&self, _: usize) -> Option<Duration> {
        Some(Duration::from_micros(70))
    }

    fn mirror_status(&self, disk: usize) -> Option<MirrorStatus> {
        let state = self.0.borrow();
        let (done, total) = state.progress;
        state.targets[disk].as_ref().map(|_| MirrorStatus {
            mode: CopyMode::Background,
            total,
            done,
            remaining: total - done,
            in_flight: 0,
            speed: 0,
            ready: false,
            paused: true,
            stopped: false,
            failed: false,
            actively_synced: done == total,
            quiesced: false,
            error: None,
            copy_rate: None,
            dirty_rate: None,
            remaining_time: state.estimates.0,
            expected_hold: state.estimates.1,
        })
    }
}
