//! Places where a test lets the process die, or an operation fail. Without the feature `failpoints` there are none.
//!
//! A place has a name of three words, `FILE.STEP.POINT`:
//!
//! ```text
//!   journal.STAGE.POINT       STAGE: planned, …, pivot-intent, …, done (`Stage::name`); epoch: taken over;
//!                             settle: the last record again; create and compact: the whole file
//!   witness.STEP.POINT        create, pivoted, revoked, remove
//!   disks.commit.POINT        the durable configuration
//!   stamp.STEP.POINT          incomplete, superseded, remove
//!   image.STEP.POINT          create, sync, remove
//!
//!   POINT   before    nothing has happened
//!           written   written, in the page cache; not synced
//!           synced    synced
//!           renamed   (files that are replaced) under its name; the directory is not synced
//!           done      (files that are created, replaced, removed) the directory is synced, too
//! ```
//!
//! Between steps that somebody else can see there are `coordinator.STEP.POINT` and, in the VMM, `jobs.STEP.POINT`.
//!
//! The environment variable `TARN_FAILPOINT` arms some: `NAME[:N][+][=kill|wait|eio|enospc][,…]`. `N` is how often the
//! place is passed until it happens (1 unless told); it happens once, or with `+` from then on every time. A `*` stands
//! for any word. `kill` (the default) is SIGKILL. An error before a write means that nothing is written, one at `written`
//! that the sync fails, one after the sync that it was told to have failed and has not. `wait` connects to the unix socket
//! `TARN_FAILPOINT_GATE`, writes the place's name and waits until the other side hangs up.
//!
//! `TARN_MISTAKE` names a mistake to make ([`mistake`]): whoever looks for lost writes has to find some then.
//!
//! `TARN_FAILPOINT_LOG` names a file to which each place that is passed is added, a line each.

/// Passes a place: does nothing, unless a test has armed it.
///
/// # Errors
/// The armed one.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn pass(_place: [&str; 3]) -> std::io::Result<()> {
    Ok(())
}

/// Whether a test asks for this mistake: never, without the feature.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn mistake(_name: &str) -> bool {
    false
}

#[cfg(feature = "failpoints")]
pub use armed::{mistake, pass, with};

#[cfg(feature = "failpoints")]
mod armed {
    use std::cell::RefCell;
    use std::env;
    use std::fs::OpenOptions;
    use std::io::{self, Read, Write};
    use std::os::unix::net::UnixStream;
    use std::rc::Rc;
    use std::str::FromStr;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    use rustix::io::Errno;
    use rustix::process::{Signal, getpid, kill_process};

    /// A place, armed.
    #[derive(Debug)]
    struct Armed {
        words: [String; 3],
        nth: u32,
        onwards: bool,
        action: Action,
        passed: AtomicU32,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Action {
        Kill,
        Wait,
        Fail(Errno),
    }

    impl FromStr for Armed {
        type Err = String;

        fn from_str(text: &str) -> Result<Self, String> {
            let (place, action) = text.split_once('=').unwrap_or((text, "kill"));
            let action = match action {
                "kill" => Action::Kill,
                "wait" => Action::Wait,
                "eio" => Action::Fail(Errno::IO),
                "enospc" => Action::Fail(Errno::NOSPC),
                _ => return Err(format!("{action:?} is none of kill, wait, eio, enospc")),
            };
            let (place, onwards) = place.strip_suffix('+').map_or((place, false), |place| (place, true));
            let (name, nth) = place.split_once(':').unwrap_or((place, "1"));
            let nth = nth.parse().map_err(|_| format!("{nth:?} is no number"))?;
            let words: Vec<_> = name.split('.').map(str::to_owned).collect();
            let words = words.try_into().map_err(|_| format!("{name:?} is not FILE.STEP.POINT"))?;
            Ok(Self { words, nth, onwards, action, passed: AtomicU32::new(0) })
        }
    }

    impl Armed {
        fn happens(&self, place: [&str; 3]) -> Option<Action> {
            let is_this = self.words.iter().zip(place).all(|(word, passed)| word == "*" || word == passed);
            if !is_this {
                return None;
            }
            let passed = self.passed.fetch_add(1, Ordering::Relaxed) + 1;
            let happens = if self.onwards { passed >= self.nth } else { passed == self.nth };
            happens.then_some(self.action)
        }
    }

    fn parse(text: &str) -> Vec<Armed> {
        let armed = text.split(',').filter(|one| !one.is_empty()).map(str::parse);
        // A test that armed nothing would pass for the wrong reason.
        armed.collect::<Result<_, _>>().unwrap_or_else(|error| panic!("TARN_FAILPOINT: {error}"))
    }

    thread_local! {
        static OF_THREAD: RefCell<Option<Rc<Vec<Armed>>>> = const { RefCell::new(None) };
    }

    /// Calls `action` with other places armed on this thread (written as in `TARN_FAILPOINT`), in place of those of
    /// the environment.
    ///
    /// # Panics
    /// `text` makes no sense.
    pub fn with<T>(text: &str, action: impl FnOnce() -> T) -> T {
        let before = OF_THREAD.replace(Some(Rc::new(parse(text))));
        let result = action();
        OF_THREAD.set(before);
        result
    }

    /// Passes a place.
    ///
    /// # Errors
    /// The armed one.
    ///
    /// # Panics
    /// `TARN_FAILPOINT` makes no sense.
    pub fn pass(place: [&str; 3]) -> io::Result<()> {
        static OF_PROCESS: OnceLock<Vec<Armed>> = OnceLock::new();
        log(place);
        let of_thread = OF_THREAD.with_borrow(Clone::clone);
        let armed = match &of_thread {
            Some(armed) => armed,
            None => OF_PROCESS.get_or_init(|| parse(&env::var("TARN_FAILPOINT").unwrap_or_default())),
        };
        match armed.iter().filter_map(|armed| armed.happens(place)).last() {
            None => Ok(()),
            Some(Action::Fail(errno)) => Err(errno.into()),
            Some(Action::Kill) => die(),
            Some(Action::Wait) => {
                wait(place);
                Ok(())
            }
        }
    }

    fn die() -> ! {
        let _ = kill_process(getpid(), Signal::KILL);
        loop {
            std::thread::park();
        }
    }

    fn wait(place: [&str; 3]) {
        let path = env::var_os("TARN_FAILPOINT_GATE").expect("TARN_FAILPOINT_GATE names a socket");
        let waited = UnixStream::connect(path).and_then(|mut gate| {
            writeln!(gate, "{}", place.join("."))?;
            gate.read(&mut [0])
        });
        // Nobody is there any more: the test is over.
        if waited.is_err() {
            die();
        }
    }

    /// Whether a test asks for this mistake.
    pub fn mistake(name: &str) -> bool {
        static ASKED: OnceLock<Option<String>> = OnceLock::new();
        ASKED.get_or_init(|| env::var("TARN_MISTAKE").ok()).as_deref() == Some(name)
    }

    fn log(place: [&str; 3]) {
        let Some(path) = env::var_os("TARN_FAILPOINT_LOG") else { return };
        if let Ok(mut log) = OpenOptions::new().append(true).create(true).open(path) {
            let _ = writeln!(log, "{}", place.join("."));
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        fn passes(armed: &str, place: [&str; 3], times: usize) -> Vec<bool> {
            with(armed, || (0..times).map(|_| pass(place).is_ok()).collect())
        }

        #[test]
        fn a_place_fails_when_it_is_told_to_and_no_other_does() {
            let place = ["journal", "planned", "written"];
            assert_eq!(passes("", place, 2), [true, true]);
            assert_eq!(passes("journal.planned.written=eio", place, 2), [false, true]);
            assert_eq!(passes("journal.planned.written:2=enospc", place, 3), [true, false, true]);
            assert_eq!(passes("journal.planned.written:2+=eio", place, 3), [true, false, false]);
            assert_eq!(passes("journal.*.written=eio", place, 1), [false]);
            assert_eq!(passes("witness.*.*=eio,journal.planned.synced=eio", place, 1), [true]);
            let error = with("*.*.*=enospc", || pass(place)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
        }

        #[test]
        fn what_makes_no_sense_arms_nothing_silently() {
            for text in ["journal.planned", "a.b.c=die", "a.b.c:x", "a.b.c.d"] {
                assert!(text.parse::<Armed>().is_err(), "{text}");
            }
        }
    }
}
