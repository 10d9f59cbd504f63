//! The console: a terminal, and everybody else who looks at it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};

use crate::harness::{Lab, connect, eventually, guest_image, run};

/// `tarn run` on a terminal that script(1) makes; what is typed goes through its standard input.
struct Terminal {
    child: Child,
    keys: ChildStdin,
    screen: PathBuf,
}

impl Terminal {
    fn run(lab: &Lab, command: &str) -> Self {
        let screen = lab.path("screen");
        let mut child = Command::new("script")
            .args(["-q", "-f", "-e", "-c", &format!("stty rows 30 cols 100; exec {command}")])
            .arg(&screen)
            .env("TARN_RUN_DIR", lab.path("run"))
            .env("TARN_GUEST_IMAGE", guest_image(""))
            .env("SHELL", "/bin/sh")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("script, of Debian's bsdutils");
        let keys = child.stdin.take().unwrap();
        Self { child, keys, screen }
    }

    fn type_keys(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
        self.keys.flush().unwrap();
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.screen).unwrap_or_default()).into_owned()
    }

    fn shows(&self, what: &str) {
        eventually(&format!("{what:?} on the terminal"), || self.text().contains(what).then_some(()));
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- terminal\n{}", self.text());
        }
    }
}

/// Reads from a console client until `what` has come.
fn read_until(client: &mut UnixStream, what: &str) -> String {
    let mut text = Vec::new();
    let mut buffer = [0; 64 << 10];
    loop {
        let len = client
            .read(&mut buffer)
            .unwrap_or_else(|e| panic!("{e}: no {what:?} in {}", String::from_utf8_lossy(&text)));
        assert_ne!(len, 0, "the console ended without {what:?}");
        let fresh = text.len().saturating_sub(what.len());
        text.extend_from_slice(&buffer[..len]);
        if text[fresh..].windows(what.len()).any(|window| window == what.as_bytes()) {
            return String::from_utf8_lossy(&text).into_owned();
        }
    }
}

#[test]
fn a_console_is_for_everybody_and_waits_for_nobody() {
    let Some(lab) = Lab::new("console") else { return };
    let mut terminal = Terminal::run(&lab, &format!("{} run --name con --shell", crate::harness::TARN));
    let socket = lab.path("run/con/console.sock");
    terminal.shows("root@tarn:/#");
    terminal.type_keys("echo first-$((6 * 7))\r");
    terminal.shows("first-42");

    // Others see what was, and what comes, and may type too.
    let mut clients = [connect(&socket), connect(&socket)];
    let silent = connect(&socket);
    for client in &mut clients {
        read_until(client, "first-42");
    }
    clients[0].write_all(b"echo second-$((6 * 8))\r").unwrap();
    for client in &mut clients {
        read_until(client, "second-48");
    }
    terminal.shows("second-48");

    // The guest's terminal has the size of ours.
    terminal.type_keys("echo size-$(stty size | tr ' ' x)\r");
    terminal.shows("size-30x100");
    let pid = std::fs::read_to_string(lab.path("run/con/pid")).unwrap();
    let pts = std::fs::read_link(format!("/proc/{}/fd/0", pid.trim())).unwrap();
    run(Command::new("stty").arg("-F").arg(&pts).args(["rows", "41", "cols", "121"]));
    terminal
        .type_keys("until [ \"$(stty size)\" = '41 121' ]; do sleep 0.1; done; echo resized-$((1 + 1))\r");
    terminal.shows("resized-2");

    // More than any socket takes: who does not read does not hold the guest up, and others miss nothing. Long lines, since
    // the guest spins with interrupts off for each write.
    terminal.type_keys("pad=$(head -c 2000 /dev/zero | tr '\\0' .); i=100; clear\r");
    terminal
        .type_keys("while [ $i -lt 300 ]; do echo \"$i $pad\"; i=$((i + 1)); done; echo all-$((3 * 3))\r");
    let text = read_until(&mut clients[1], "all-9");
    for number in 100..300 {
        assert!(text.contains(&format!("\n{number} ...")), "line {number} is missing");
    }
    terminal.shows("all-9");
    drop(silent);

    // Ctrl-] and a dot end the VM, and the terminal is as it was.
    terminal.type_keys("\x1d.");
    let status = eventually("the end of the VM", || terminal.child.try_wait().unwrap());
    assert!(status.success(), "{status}: {}", terminal.text());
    assert!(!socket.exists());
}
