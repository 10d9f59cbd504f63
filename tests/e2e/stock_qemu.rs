//! The same agent where most agents live: under QEMU, a PCI machine with its firmware, a port on a chardev socket, no broker.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use coordinator::recipes::{copy_from_guest, copy_to_guest};
use coordinator::{GuestSession, MonitorSession};
use serde_json::{Value, json};

use crate::freeze::{ask, freeze, refusal, status, thaw};
use crate::harness::{Lab, Monitor, connect, eventually, guest_image, limit, shell};

/// QEMU with the guest image; killed when dropped.
struct Qemu<'a> {
    lab: &'a Lab,
    child: Child,
}

impl<'a> Qemu<'a> {
    fn boot(lab: &'a Lab) -> Self {
        let disk = lab.ext4("data.raw", 64 << 20);
        let path = |file: &str| lab.path(file).display().to_string();
        let file = |name: &str| File::create(lab.path(name)).unwrap();
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-M", "q35", "-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", "256M"]);
        command.arg("-kernel").arg(guest_image("vmlinux"));
        command.arg("-initrd").arg(guest_image("initramfs.cpio.zst"));
        command.args(["-append", "console=ttyS0 quiet panic=-1 tarn.mount=/dev/vda:/data:ext4"]);
        command.args(["-serial", "stdio", "-device", "virtio-serial-pci"]);
        command.args(["-serial", &format!("unix:{},server=on,wait=off", path("line.sock"))]);
        command
            .args(["-chardev", &format!("socket,id=agent,server=on,wait=off,path={}", path("agent.sock"))]);
        command.args(["-device", PORT]);
        command.args(["-drive", &format!("if=none,id=data,format=raw,file={}", disk.display())]);
        command.args(["-device", "virtio-blk-pci,drive=data,addr=5,serial=precious"]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp.sock"))]);
        let child = command
            .stdin(Stdio::null())
            .stdout(file("console"))
            .stderr(file("log"))
            .spawn()
            .expect("qemu-system-x86_64");
        Self { lab, child }
    }

    fn socket(&mut self, file: &str) -> PathBuf {
        let path = self.lab.path(file);
        eventually("QEMU's sockets", || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("QEMU ended ({status}): {}", fs::read_to_string(self.lab.path("log")).unwrap());
            }
            path.exists().then_some(())
        });
        path
    }

    /// A client of the agent; QEMU serves one at a time.
    fn agent(&mut self) -> GuestSession {
        self.agent_at("agent.sock")
    }

    fn agent_at(&mut self, file: &str) -> GuestSession {
        let path = self.socket(file);
        // The file is there a moment before anybody listens.
        let mut session = eventually("QEMU to listen", || GuestSession::connect(&path).ok());
        if let Err(error) = session.wait_for_agent(limit()) {
            let console = fs::read(self.lab.path("console")).unwrap();
            panic!("No agent under QEMU: {error}\n{}", String::from_utf8_lossy(&console));
        }
        session
    }

    fn monitor(&mut self) -> Monitor {
        let path = self.socket("qmp.sock");
        Monitor(MonitorSession::connect(&path, limit()).expect("QEMU greets"))
    }
}

impl Drop for Qemu<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const PORT: &str = "virtserialport,chardev=agent,id=port,name=org.qemu.guest_agent.0";

#[test]
fn the_agent_serves_under_qemu_as_well() {
    let Some(lab) = Lab::new("stock-qemu") else { return };
    let mut qemu = Qemu::boot(&lab);
    let mut agent = qemu.agent();
    it_tells_about_itself(&mut agent);
    it_runs_programs_and_copies_files(&mut agent);
    it_freezes_and_thaws(&mut agent);
    drop(agent);
    it_thaws_when_its_port_is_pulled_out_and_serves_the_next(&mut qemu);
    every_one_of_many_hasty_clients_gets_its_two_adjacent_answers(&mut qemu);
    another_agent_in_the_background_serves_a_serial_line(&mut qemu);

    let mut agent = qemu.agent();
    agent.execute_without_reply("guest-shutdown", None, Duration::from_secs(2)).expect("guest-shutdown");
    let ended = eventually("the end of QEMU", || qemu.child.try_wait().unwrap());
    assert!(ended.success(), "{ended}");
}

fn it_tells_about_itself(agent: &mut GuestSession) {
    assert_eq!(ask(agent, "guest-ping", &json!({})), json!({}));
    assert_eq!(ask(agent, "guest-sync", &json!({"id": 7})), 7);
    let info = ask(agent, "guest-info", &json!({}));
    let commands = info["supported_commands"].as_array().unwrap();
    let enabled =
        |name: &str| commands.iter().any(|command| command["name"] == name && command["enabled"] == true);
    for name in ["guest-exec", "guest-file-open", "guest-fsfreeze-freeze", "guest-shutdown"] {
        assert!(enabled(name), "{name} in {info}");
    }
    let os = ask(agent, "guest-get-osinfo", &json!({}));
    assert_eq!(os["machine"], "x86_64");
    assert!(os["kernel-release"].as_str().unwrap().contains("cloud-amd64"), "{os}");
    assert_eq!(refusal(agent, "guest-no-such", &Value::Null).0, "CommandNotFound");
    let address = json!({"bus-type": "virtio", "bus": 0, "target": 0, "unit": 0, "serial": "precious",
        "dev": "/dev/vda", "pci-controller": {"domain": 0, "bus": 0, "slot": 5, "function": 0}});
    assert_eq!(ask(agent, "guest-get-fsinfo", &Value::Null)[0]["disk"], json!([address]));
    // This machine has a hardware clock, which follows the system's.
    assert_eq!(ask(agent, "guest-set-time", &json!({"time": 2_000_000_000_000_000_000_i64})), json!({}));
    assert_eq!(ask(agent, "guest-set-time", &Value::Null), json!({}));
    assert_eq!(shell(agent, "date +%Y").unwrap(), (0, "2033\n".into()));
}

fn it_runs_programs_and_copies_files(agent: &mut GuestSession) {
    let (status, text) = shell(agent, "ls /sys/bus/pci/devices | wc -l; echo err >&2; exit 3").unwrap();
    assert_eq!(status, 3, "{text}");
    assert!(text.contains("err"), "{text}");
    // More than one read or write takes, in every byte there is.
    let bytes: Vec<u8> = (0..300_000_u32).map(|index| index.to_le_bytes()[(index % 3) as usize]).collect();
    copy_to_guest(agent, &mut bytes.as_slice(), "/data/file", "file", &mut |_| {}).unwrap();
    let mut back = Vec::new();
    copy_from_guest(agent, "/data/file", &mut back, &mut |_, _| {}).unwrap();
    assert!(back == bytes, "the file came back different");
}

fn it_freezes_and_thaws(agent: &mut GuestSession) {
    assert_eq!(freeze(agent), 1);
    assert_eq!(status(agent), "frozen");
    assert_eq!(refusal(agent, "guest-exec", &json!({"path": "true"})).0, "CommandNotFound");
    assert_eq!(thaw(agent), 1);
    assert_eq!(status(agent), "thawed");
    assert_eq!(shell(agent, "echo written >/data/after && sync").unwrap().0, 0);
}

/// Nobody can ask for the thaw then. The port comes back as another device, with the same name.
fn it_thaws_when_its_port_is_pulled_out_and_serves_the_next(qemu: &mut Qemu<'_>) {
    let mut monitor = qemu.monitor();
    assert_eq!(freeze(&mut qemu.agent()), 1);
    monitor.run_with("device_del", &json!({"id": "port"}));
    monitor.await_event("DEVICE_DELETED");
    let port: serde_json::Map<_, _> = PORT
        .split(',')
        .skip(1)
        .filter_map(|option| option.split_once('='))
        .map(|(k, v)| (k.into(), v.into()))
        .collect();
    let mut arguments = json!({"driver": "virtserialport"});
    arguments.as_object_mut().unwrap().extend(port);
    monitor.run_with("device_add", &arguments);
    let mut agent = qemu.agent();
    eventually("the thaw", || (status(&mut agent) == "thawed").then_some(()));
    assert_eq!(thaw(&mut agent), 0);
    assert_eq!(shell(&mut agent, "echo written >/data/unplugged && sync").unwrap().0, 0);
}

/// As Proxmox VE asks: a connection for each command, one right behind the other, two requests in one write.
fn every_one_of_many_hasty_clients_gets_its_two_adjacent_answers(qemu: &mut Qemu<'_>) {
    let socket = qemu.socket("agent.sock");
    for id in 4711..4731 {
        let mut client = connect(&socket);
        let sync = json!({"execute": "guest-sync-delimited", "arguments": {"id": id}});
        let ping = json!({"execute": "guest-ping", "arguments": {}});
        client.write_all(format!("{sync}\n{ping}\n").as_bytes()).unwrap();
        let expected = [b"\xff", format!("{{\"return\": {id}}}\n{{\"return\": {{}}}}\n").as_bytes()].concat();
        let mut answer = vec![0; expected.len()];
        client.read_exact(&mut answer).unwrap_or_else(|error| panic!("client {id}: {error}"));
        assert_eq!(answer, expected, "client {id}: {}", String::from_utf8_lossy(&answer));
    }
}

fn another_agent_in_the_background_serves_a_serial_line(qemu: &mut Qemu<'_>) {
    let start = "mkdir /run/line && tarn-agent -d -m isa-serial -p /dev/ttyS1 -t /run/line -f /run/line/pid";
    // The report comes when nobody holds the shell's output any more: the daemon has let go of it.
    let (status, text) = shell(&mut qemu.agent(), start).unwrap();
    assert_eq!(status, 0, "{text}");
    let mut agent = qemu.agent_at("line.sock");
    let id = "x".repeat(20_000);
    assert_eq!(ask(&mut agent, "guest-ping", &json!({})), json!({}));
    let (_, back) = shell(&mut agent, &format!("echo {id}")).unwrap();
    assert_eq!(back.trim_end(), id);
    let (status, text) = shell(&mut qemu.agent(), "kill $(cat /run/line/pid)").unwrap();
    assert_eq!(status, 0, "{text}");
    eventually("the end of the other agent", || {
        (shell(&mut qemu.agent(), "test -e /run/line/pid").unwrap().0 == 1).then_some(())
    });
}
