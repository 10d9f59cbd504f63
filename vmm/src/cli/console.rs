//! `tarn console`.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use anyhow::Context;
use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};

use super::output;
use super::vm_name::VmName;
use crate::terminal::{EscapeFilter, RawMode, Typed};

/// Connect this terminal to the console of a VM
///
/// Ctrl-] then . leaves; Ctrl-] twice sends one Ctrl-]. Input that is no terminal is passed on as it is, and its end
/// does not end the connection: the output goes on until the VM ends.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  tarn console web\n  tarn console web < /dev/null > console.log")]
pub(super) struct ConsoleArgs {
    #[command(flatten)]
    vm: VmName,
}

pub(super) fn run(args: &ConsoleArgs) -> anyhow::Result<u8> {
    let vm = args.vm.open()?;
    let mut socket = UnixStream::connect(vm.console_socket())
        .with_context(|| format!("Cannot connect to the console of VM {}", vm.name()))?;
    if io::stdin().is_terminal() {
        output::complain(&format!("Connected to the console of VM {}; {}", vm.name(), EscapeFilter::HINT));
    }
    let raw = RawMode::enter().context("Cannot take over the terminal")?;
    let ended = relay(&mut socket, raw.is_some());
    let was_raw = raw.is_some();
    drop(raw);
    match ended? {
        // The guest's last line is seldom complete.
        Left::ByUser if was_raw => output::complain_below("Left the console; the VM goes on"),
        Left::VmEnded if was_raw => output::complain_below(&format!("VM {} has ended", vm.name())),
        _ => {}
    }
    Ok(0)
}

enum Left {
    ByUser,
    VmEnded,
}

/// Carries bytes both ways until one side leaves.
fn relay(socket: &mut UnixStream, is_terminal: bool) -> anyhow::Result<Left> {
    let stdin = io::stdin();
    let mut filter = EscapeFilter::default();
    let mut input_open = true;
    let mut buffer = [0; 16 << 10];
    let mut to_guest = Vec::new();
    loop {
        let interest = if input_open { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::from_borrowed_fd(stdin.as_fd(), interest)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            result => result.context("Cannot wait for the console")?,
        };
        let [from_guest, typed] = fds.map(|fd| fd.revents());
        if !from_guest.is_empty() {
            match socket.read(&mut buffer) {
                Ok(0) => return Ok(Left::VmEnded),
                Ok(count) => output::print(&buffer[..count])?,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Left::VmEnded),
                Err(error) => return Err(error).context("The connection to the console broke"),
            }
        }
        if input_open && !typed.is_empty() {
            // Around std's buffer: poll must see what has not been read.
            let count = match rustix::io::read(&stdin, &mut buffer) {
                Err(rustix::io::Errno::INTR) => continue,
                // A terminal that was hung up reads as an error.
                Err(rustix::io::Errno::IO) => 0,
                result => result.context("Cannot read standard input")?,
            };
            input_open = count > 0;
            if count == 0 && is_terminal {
                return Ok(Left::ByUser);
            }
            to_guest.clear();
            let typed = if is_terminal {
                filter.pass(&buffer[..count], &mut to_guest)
            } else {
                to_guest.extend_from_slice(&buffer[..count]);
                Typed::More
            };
            match socket.write_all(&to_guest) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Left::VmEnded),
                result => result.context("The connection to the console broke")?,
            }
            if typed == Typed::Leave {
                return Ok(Left::ByUser);
            }
        }
    }
}
