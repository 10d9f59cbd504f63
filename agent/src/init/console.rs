//! The console as standard input, output and error, and the machine's name.

use std::fs::OpenOptions;

use super::say;

/// Lets messages, and those of every service, appear on the console. Without one they go nowhere.
pub(super) fn attach() {
    let Ok(console) = OpenOptions::new().read(true).write(true).open("/dev/console") else { return };
    let attached = rustix::stdio::dup2_stdin(&console)
        .and_then(|()| rustix::stdio::dup2_stdout(&console))
        .and_then(|()| rustix::stdio::dup2_stderr(&console));
    if let Err(error) = attached {
        say!("cannot use the console: {error}");
    }
    std::panic::set_hook(Box::new(|panic| say!("{panic}")));
}

pub(super) fn set_hostname(name: &str) {
    if let Err(error) = rustix::system::sethostname(name.as_bytes()) {
        say!("cannot set the hostname to {name}: {error}");
    }
}

/// The terminal behind `/dev/console`, which itself cannot be a controlling terminal; the last one
/// the kernel lists is the one it reads from.
pub(super) fn terminal() -> String {
    let active = std::fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    active.split_whitespace().next_back().unwrap_or("console").to_owned()
}
