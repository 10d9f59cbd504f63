//! Where a block device is: a function of its path in `/sys/devices` and of what lies beside it.
//!
//! ```text
//!   /sys/devices/pci0000:00/0000:00:04.0/virtio2/host2/target2:0:1/2:0:1:3/block/sda/sda1
//!                           └─ controller        └─ host           └─ host:bus:target:unit
//!   /sys/devices/LNRO0005:00/virtio0/block/vda      virtio-mmio: no PCI controller at all
//! ```
//!
//! Clients require every number. Those that do not apply are -1 in the controller, and 0 elsewhere, as
//! the reference has it.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::root::{Root, digits};
use crate::schema::{Type, optional, required};

pub(super) const DISK_ADDRESS: Type = Type::Object(&[
    required(
        "pci-controller",
        Type::Object(&[
            required("domain", Type::Int),
            required("bus", Type::Int),
            required("slot", Type::Int),
            required("function", Type::Int),
        ]),
    ),
    required("bus-type", Type::Enum(BUS_TYPES)),
    required("bus", Type::Int),
    required("target", Type::Int),
    required("unit", Type::Int),
    optional("serial", Type::Str),
    optional("dev", Type::Str),
]);

/// The reference's words, of which this agent uses those for buses it can tell.
const BUS_TYPES: &[&str] = &[
    "ide",
    "fdc",
    "scsi",
    "virtio",
    "xen",
    "usb",
    "uml",
    "sata",
    "sd",
    "unknown",
    "ieee1394",
    "ssa",
    "fibre",
    "raid",
    "iscsi",
    "sas",
    "mmc",
    "virtual",
    "file-backed-virtual",
    "nvme",
];

/// Longest serial number; the hardware may say anything.
const SERIAL: usize = 256;

/// A block device, a whole disk or a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BlockDevice {
    /// Its directory below `/sys/devices`.
    path: PathBuf,
}

impl BlockDevice {
    /// By a path of which `/sys/dev/block/254:0` and `/sys/block/vda` are examples.
    pub(super) fn find(root: &Root, path: impl AsRef<Path>) -> Option<Self> {
        root.resolve(path).ok().map(|path| Self { path })
    }

    /// The kernel's name: `vda`, `dm-0`.
    pub(super) fn name(&self) -> Option<&str> {
        self.path.file_name()?.to_str()
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Its file below `/dev`.
    pub(super) fn node(&self, root: &Root) -> Option<String> {
        let text = root.text(self.path.join("uevent")).ok()?;
        let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
        (!name.is_empty()).then(|| format!("/dev/{name}"))
    }

    /// Whether it is made of other devices or of files: device mapper, md, loop, zram.
    pub(super) fn is_virtual(&self) -> bool {
        self.path.starts_with("/sys/devices/virtual")
    }

    /// What a virtual device is directly made of.
    pub(super) fn slaves(&self, root: &Root) -> Vec<Self> {
        let directory = self.path.join("slaves");
        let names = root.names(&directory).unwrap_or_default();
        names.iter().filter_map(|name| Self::find(root, directory.join(name))).collect()
    }

    /// What [`DISK_ADDRESS`] declares; `None` for a virtual device.
    pub(super) fn address(&self, root: &Root) -> Option<Value> {
        if self.is_virtual() {
            return None;
        }
        let components: Vec<&str> = self.path.iter().filter_map(|component| component.to_str()).collect();
        let place = Place::of(root, &components);
        let [domain, bus, slot, function] = place.controller.map_or([-1; 4], |pci| pci.map(i64::from));
        let mut address = json!({
            "pci-controller": {"domain": domain, "bus": bus, "slot": slot, "function": function},
            "bus-type": place.bus_type, "bus": place.bus, "target": place.target, "unit": place.unit,
        });
        for (member, value) in [("dev", self.node(root)), ("serial", self.serial(root))] {
            if let Some(value) = value {
                address[member] = value.into();
            }
        }
        Some(address)
    }

    /// udev's idea of the serial number, where there is udev, and the kernel's where not.
    fn serial(&self, root: &Root) -> Option<String> {
        let serial = self.serial_by_udev(root).or_else(|| self.serial_by_kernel(root))?;
        Some(serial.chars().take(SERIAL).collect())
    }

    fn serial_by_udev(&self, root: &Root) -> Option<String> {
        let number = root.line(self.path.join("dev"))?;
        let record = root.text(format!("/run/udev/data/b{number}")).ok()?;
        let serial = record.lines().find_map(|line| line.strip_prefix("E:ID_SERIAL="))?;
        (!serial.is_empty()).then(|| serial.to_owned())
    }

    /// The disk's, for a partition as well.
    fn serial_by_kernel(&self, root: &Root) -> Option<String> {
        let is_partition = root.has(self.path.join("partition"));
        let disk = if is_partition { self.path.parent()? } else { &self.path };
        let plain = ["serial", "device/serial"].iter().find_map(|file| root.line(disk.join(file)));
        plain.or_else(|| unit_serial_number(&root.read(disk.join("device/vpd_pg80")).ok()?))
    }
}

/// A SCSI disk's page of vital product data number 0x80 (SPC-4, 7.8.18): its length in bytes 2 and 3, the text from 4.
fn unit_serial_number(page: &[u8]) -> Option<String> {
    let length = usize::from(u16::from_be_bytes(page.get(2..4)?.try_into().ok()?));
    let text = page.get(4..)?;
    let text = String::from_utf8_lossy(&text[..length.min(text.len())]);
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
    (!text.is_empty()).then(|| text.to_owned())
}

/// Where a device is, apart from its names.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    /// Domain, bus, slot, function.
    controller: Option<[u32; 4]>,
    bus_type: &'static str,
    bus: u32,
    target: u32,
    unit: u32,
}

impl Place {
    fn of(root: &Root, components: &[&str]) -> Self {
        // The last one: those before it are bridges.
        let at = components.iter().rposition(|component| pci_address(component).is_some());
        let controller = at.map(|at| components[..=at].iter().collect::<PathBuf>());
        let driver = controller.as_ref().and_then(|controller| root.link_name(controller.join("driver")));
        let port = || controller.as_ref().map_or(0, |controller| port(root, components, controller));
        let mut place = Self {
            controller: at.and_then(|at| pci_address(components[at])),
            bus_type: "unknown",
            bus: 0,
            target: 0,
            unit: 0,
        };
        let scsi = components.iter().rev().find_map(|component| scsi_address(component));
        let has = |prefix: &str| components.iter().any(|component| component.starts_with(prefix));
        match (driver.as_deref(), scsi) {
            (Some("nvme"), _) => place.bus_type = "nvme",
            // One host for each port, and one disk at each.
            (Some("ahci"), _) if has("ata") => {
                place.bus_type = "sata";
                place.unit = port();
            }
            // One host for each cable, with two disks.
            (Some("ata_piix"), Some([_, _, target, _])) => {
                place.bus_type = "ide";
                place.bus = port();
                place.unit = target;
            }
            (Some("sym53c8xx"), Some([_, _, target, _])) => (place.bus_type, place.unit) = ("scsi", target),
            (_, Some(_)) if has("usb") => place.bus_type = "usb",
            (_, Some([_, bus, target, unit])) => {
                let bus_type = if has("ata") { "sata" } else { "scsi" };
                (place.bus_type, place.bus, place.target, place.unit) = (bus_type, bus, target, unit);
            }
            (_, None) if has("virtio") => place.bus_type = "virtio",
            (_, None) if has("mmc") => place.bus_type = "mmc",
            (_, None) if has("vbd-") => place.bus_type = "xen",
            (_, None) => {}
        }
        place
    }
}

/// Which of its controller's ports a disk is at: ports of all controllers are numbered together.
fn port(root: &Root, components: &[&str], controller: &Path) -> u32 {
    let number = |component: &&str| digits::<u32>(component.strip_prefix("ata")?);
    let own = components.iter().find_map(number);
    let ports = root.numbered::<u32>(controller, "ata").unwrap_or_default();
    let index = own.and_then(|own| ports.iter().position(|&port| port == own));
    index.and_then(|index| u32::try_from(index).ok()).unwrap_or(0)
}

/// `0000:00:02.0`.
fn pci_address(component: &str) -> Option<[u32; 4]> {
    let (slots, function) = component.rsplit_once('.')?;
    let mut parts = slots.split(':');
    let (domain, bus, slot) = (parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, width: std::ops::RangeInclusive<usize>| {
        let is_number = width.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_number.then(|| u32::from_str_radix(text, 16).ok()).flatten()
    };
    let address = [hex(domain, 4..=8)?, hex(bus, 2..=2)?, hex(slot, 2..=2)?, hex(function, 1..=1)?];
    parts.next().is_none().then_some(address)
}

/// `2:0:1:3`: host, bus, target, unit.
fn scsi_address(component: &str) -> Option<[u32; 4]> {
    let parts: Option<Vec<u32>> = component.split(':').map(digits).collect();
    parts?.try_into().ok()
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// A machine with one disk of each kind.
    pub(in crate::commands) struct Machine {
        pub(in crate::commands) root: Root,
        _directory: tempfile::TempDir,
    }

    impl Machine {
        pub(in crate::commands) fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let root = Root::at(directory.path());
            for path in ["/sys/block", "/sys/dev/block", "/run/udev/data"] {
                fs::create_dir_all(root.join(path)).unwrap();
            }
            Self { root, _directory: directory }
        }

        /// A block device, linked from where the kernel links it.
        pub(in crate::commands) fn device(&self, path: &str, number: &str, files: &[(&str, &str)]) {
            let directory = self.root.join(path);
            let name = path.rsplit('/').next().unwrap();
            fs::create_dir_all(directory.join("slaves")).unwrap();
            let relative = path.strip_prefix("/sys/").unwrap();
            symlink(format!("../../{relative}"), self.root.join(format!("/sys/dev/block/{number}"))).unwrap();
            if !files.iter().any(|&(file, _)| file == "partition") {
                symlink(format!("../{relative}"), self.root.join(format!("/sys/block/{name}"))).unwrap();
            }
            let uevent = format!("MAJOR=1\nDEVNAME={name}\nDEVTYPE=disk\n");
            for (file, content) in [("dev", number), ("uevent", &uevent)].iter().chain(files) {
                let file = directory.join(file);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, content).unwrap();
            }
        }

        pub(in crate::commands) fn driver(&self, device: &str, driver: &str) {
            fs::create_dir_all(self.root.join(device)).unwrap();
            symlink(format!("../../bus/pci/drivers/{driver}"), self.root.join(device).join("driver"))
                .unwrap();
        }

        fn address(&self, number: &str) -> Value {
            let device = BlockDevice::find(&self.root, format!("/sys/dev/block/{number}")).unwrap();
            let address = device.address(&self.root).unwrap();
            DISK_ADDRESS.check(&address).unwrap();
            address
        }
    }

    fn pci(bus: u32, slot: u32, function: u32) -> Value {
        json!({"domain": 0, "bus": bus, "slot": slot, "function": function})
    }

    #[test]
    fn a_virtio_disk_is_as_recorded() {
        let machine = Machine::new();
        machine.driver("/sys/devices/pci0000:00/0000:00:02.0", "virtio-pci");
        machine.device("/sys/devices/pci0000:00/0000:00:02.0/virtio1/block/vda", "254:0", &[]);
        let expected = json!({"bus-type": "virtio", "bus": 0, "unit": 0, "target": 0, "dev": "/dev/vda",
            "pci-controller": pci(0, 2, 0)});
        assert_eq!(machine.address("254:0"), expected);
    }

    #[test]
    fn a_virtio_disk_on_mmio_has_no_controller() {
        let machine = Machine::new();
        let disk = "/sys/devices/LNRO0005:01/virtio2/block/vdb";
        machine.device(disk, "254:16", &[("serial", "precious")]);
        machine.device(&format!("{disk}/vdb1"), "254:17", &[("partition", "1\n")]);
        let mut expected = json!({"bus-type": "virtio", "bus": 0, "unit": 0, "target": 0, "dev": "/dev/vdb",
            "serial": "precious",
            "pci-controller": {"domain": -1, "bus": -1, "slot": -1, "function": -1}});
        assert_eq!(machine.address("254:16"), expected);
        expected["dev"] = "/dev/vdb1".into();
        assert_eq!(machine.address("254:17"), expected, "a partition has its disk's serial number");
    }

    #[test]
    fn the_controller_behind_bridges_is_the_last_one() {
        let machine = Machine::new();
        let controller = "/sys/devices/pci0000:00/0000:00:1e.0/0000:01:01.0/0000:02:0a.1";
        machine.driver(controller, "virtio-pci");
        machine.device(&format!("{controller}/virtio3/host2/target2:0:5/2:0:5:9/block/sdb"), "8:16", &[]);
        let address = machine.address("8:16");
        assert_eq!(address["pci-controller"], pci(2, 10, 1));
        assert_eq!(address["bus-type"], "scsi");
        assert_eq!(
            (&address["bus"], &address["target"], &address["unit"]),
            (&json!(0), &json!(5), &json!(9))
        );
    }

    #[test]
    fn ports_of_ata_controllers_are_counted_from_their_first() {
        let machine = Machine::new();
        let ahci = "/sys/devices/pci0000:00/0000:00:1f.2";
        machine.driver(ahci, "ahci");
        for port in [3, 4, 10] {
            fs::create_dir_all(machine.root.join(format!("{ahci}/ata{port}"))).unwrap();
        }
        machine.device(&format!("{ahci}/ata10/host9/target9:0:0/9:0:0:0/block/sdc"), "8:32", &[]);
        let address = machine.address("8:32");
        assert_eq!((&address["bus-type"], &address["unit"]), (&json!("sata"), &json!(2)));
        let piix = "/sys/devices/pci0000:00/0000:00:01.1";
        machine.driver(piix, "ata_piix");
        fs::create_dir_all(machine.root.join(format!("{piix}/ata1"))).unwrap();
        machine.device(&format!("{piix}/ata2/host1/target1:0:1/1:0:1:0/block/sda"), "8:0", &[]);
        let address = machine.address("8:0");
        assert_eq!(
            (&address["bus-type"], &address["bus"], &address["target"], &address["unit"]),
            (&json!("ide"), &json!(1), &json!(0), &json!(1))
        );
    }

    #[test]
    fn other_buses_are_told_by_their_names() {
        let machine = Machine::new();
        let nvme = "/sys/devices/pci0000:00/0000:00:05.0";
        machine.driver(nvme, "nvme");
        machine.device(&format!("{nvme}/nvme/nvme0/nvme0n1"), "259:0", &[("device/serial", "S1  \n")]);
        let address = machine.address("259:0");
        assert_eq!((&address["bus-type"], &address["serial"]), (&json!("nvme"), &json!("S1")));
        let usb = "/sys/devices/pci0000:00/0000:00:06.0";
        machine.driver(usb, "xhci_hcd");
        machine.device(&format!("{usb}/usb1/1-1/1-1:1.0/host7/target7:0:0/7:0:0:0/block/sdd"), "8:48", &[]);
        assert_eq!(machine.address("8:48")["bus-type"], "usb");
        machine.device("/sys/devices/platform/soc/mmc_host/mmc0/mmc0:0001/block/mmcblk0", "179:0", &[]);
        assert_eq!(machine.address("179:0")["bus-type"], "mmc");
        machine.device("/sys/devices/vbd-51712/block/xvda", "202:0", &[]);
        assert_eq!(machine.address("202:0")["bus-type"], "xen");
        machine.device("/sys/devices/platform/floppy.0/block/fd0", "2:0", &[]);
        assert_eq!(machine.address("2:0")["bus-type"], "unknown");
    }

    #[test]
    fn udevs_serial_number_comes_first() {
        let machine = Machine::new();
        machine.device("/sys/devices/LNRO0005:00/virtio0/block/vda", "254:0", &[("serial", "kernel's")]);
        let record = "S:disk/by-id/virtio-x\nE:ID_SERIAL=udev's\nE:ID_SERIAL_SHORT=no\n";
        fs::write(machine.root.join("/run/udev/data/b254:0"), record).unwrap();
        assert_eq!(machine.address("254:0")["serial"], "udev's");
    }

    #[test]
    fn pages_that_lie_about_their_length_are_read_to_their_end() {
        assert_eq!(unit_serial_number(b"\0\x80\0\x06 drive\0").as_deref(), Some("drive"));
        assert_eq!(unit_serial_number(b"\0\x80\xFF\xFFabc\0").as_deref(), Some("abc"));
        for page in [&b""[..], b"\0\x80\0", b"\0\x80\0\x04", b"\0\x80\0\x02  ", b"\0\x80\0\0abc"] {
            assert_eq!(unit_serial_number(page), None);
        }
        let long = [&b"\0\x80\xFF\xFF"[..], &[0xFF; 70_000]].concat();
        assert_eq!(unit_serial_number(&long).unwrap().chars().count(), usize::from(u16::MAX));
    }

    #[test]
    fn a_serial_number_has_an_end() {
        let machine = Machine::new();
        let serial = "é".repeat(5000);
        machine.device("/sys/devices/LNRO0005:00/virtio0/block/vda", "254:0", &[("serial", &serial)]);
        assert_eq!(machine.address("254:0")["serial"].as_str().unwrap().chars().count(), SERIAL);
    }

    #[test]
    fn names_that_only_look_like_addresses_are_none() {
        assert_eq!(pci_address("10000:e1:00.0"), Some([0x10000, 0xe1, 0, 0]));
        for name in [
            "",
            ".",
            "0000:00:02",
            "0000:00.0",
            "pci0000:00",
            "0000:00:02.0:1",
            "0:0:0.0",
            "0000:00:+2.0",
            "0000:00:02.00",
        ] {
            assert_eq!(pci_address(name), None, "{name}");
        }
        assert_eq!(scsi_address("2:0:1:3"), Some([2, 0, 1, 3]));
        for name in ["", ":::", "1:2:3", "1:2:3:4:5", "1:2:3:-4", "1:2:3:4294967296", "target2:0:1"] {
            assert_eq!(scsi_address(name), None, "{name}");
        }
    }
}
