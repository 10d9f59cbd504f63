//! QEMU with the same guest and the same disks.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use coordinator::{GuestSession, MonitorSession};

use super::machine::Disk;
use crate::harness::{Lab, Monitor, eventually, guest_image, limit};

/// QEMU; killed when dropped.
pub struct Qemu {
    /// Sockets, console and log begin with it.
    prefix: PathBuf,
    child: Child,
}

impl Qemu {
    /// A PCI machine with its firmware.
    pub fn start(lab: &Lab, program: &Path, name: &str, disks: &[Disk]) -> Self {
        let prefix = lab.path(&format!("{name}."));
        let path = |kind: &str| format!("{}{kind}", prefix.display());
        let initramfs = [fs::read(guest_image("initramfs.cpio.zst")).unwrap(), fs::read(program).unwrap()];
        fs::write(path("initramfs"), initramfs.concat()).unwrap();
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-M", "q35", "-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", "256M"]);
        command.arg("-kernel").arg(guest_image("vmlinux")).args(["-initrd", &path("initramfs")]);
        command.args(["-append", "console=ttyS0 quiet panic=-1", "-serial", "stdio"]);
        command.args(["-device", "virtio-serial-pci", "-chardev"]);
        command.arg(format!("socket,id=agent,server=on,wait=off,path={}", path("agent.sock")));
        command.args(["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp.sock"))]);
        for Disk { id, image, holdable, read_only } in disks {
            let file = match holdable {
                true => format!("driver=raw,file.driver=blkdebug,file.image.filename={}", image.display()),
                false => format!("format=raw,file={}", image.display()),
            };
            let how = if *read_only { "readonly=on" } else { "discard=unmap" };
            command.args(["-drive", &format!("if=none,id={id},{how},{file}")]);
            command.args(["-device", &format!("virtio-blk-pci,drive={id},serial={id}")]);
        }
        let file = |kind: &str| File::create(path(kind)).unwrap();
        command.stdin(Stdio::null()).stdout(file("console")).stderr(file("log"));
        let child = command.spawn().expect("qemu-system-x86_64");
        Self { prefix, child }
    }

    fn path(&self, kind: &str) -> PathBuf {
        format!("{}{kind}", self.prefix.display()).into()
    }

    pub fn socket(&mut self, kind: &str) -> PathBuf {
        let path = self.path(kind);
        eventually("QEMU's sockets", || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("QEMU ended ({status}): {}", fs::read_to_string(self.path("log")).unwrap());
            }
            path.exists().then_some(())
        });
        path
    }

    pub fn agent(&mut self) -> GuestSession {
        let path = self.socket("agent.sock");
        // The file is there a moment before anybody listens.
        let mut session = eventually("QEMU to listen", || GuestSession::connect(&path).ok());
        if let Err(error) = session.wait_for_agent(limit()) {
            panic!("No agent under QEMU: {error}\n{}", self.console());
        }
        session
    }

    pub fn monitor(&mut self) -> Monitor {
        let path = self.socket("qmp.sock");
        Monitor(eventually("QEMU's greeting", || MonitorSession::connect(&path, limit()).ok()))
    }

    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.path("console")).unwrap()).into_owned()
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = fs::read(self.path("log")).unwrap_or_default();
            eprintln!("--- log of QEMU\n{}--- console\n{}", String::from_utf8_lossy(&log), self.console());
        }
    }
}
