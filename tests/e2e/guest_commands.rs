//! What the agent tells of its machine and changes there; and that Debian's agent, beside it in the same guest, says the
//! same.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};

use coordinator::GuestSession;
use serde_json::{Value, json};

use crate::clients::prepared;
use crate::freeze::{ask, refusal};
use crate::harness::{Lab, Vm, limit};

/// The port of Debian's agent.
const PORT: &str = "org.debian.guest_agent";

fn get(agent: &mut GuestSession, command: &str) -> Value {
    ask(agent, command, &Value::Null)
}

/// The text of a refusal.
fn refused(agent: &mut GuestSession, command: &str, arguments: &Value) -> String {
    refusal(agent, command, arguments).1
}

#[test]
fn the_agent_knows_and_changes_its_machine_and_debians_agrees() {
    let Some(lab) = Lab::new("guest-commands") else { return };
    let image = lab.ext4("data.raw", 256 << 20);
    let socket = lab.path("debian.sock");
    let disk = format!("{},serial=precious", image.display());
    let channel = format!("name={PORT},socket={}", socket.display());
    let parts = partitioned(&lab);
    let mut args = vec![
        "--cpus",
        "2",
        "--disk",
        &disk,
        "--disk",
        &parts,
        "--mount",
        "/dev/vda:/data:ext4",
        "--channel",
        &channel,
    ];
    let overlay = prepared("qemu-ga.cpio");
    if let Some(overlay) = &overlay {
        args.extend(["--initrd", overlay.to_str().unwrap()]);
    }
    let mut vm = lab.boot("facts", &args);
    let mut agent = vm.agent();

    processors_go_and_come(&mut vm, &mut agent);
    interfaces_and_routes_are_told(&mut vm, &mut agent);
    filesystems_and_disks_are_told(&mut vm, &mut agent);
    partitions_and_loop_devices_are_told(&mut vm, &mut agent);
    counters_count(&mut agent);
    if overlay.is_some() {
        let program = format!(
            "/usr/sbin/qemu-ga --method=virtio-serial --path=/dev/virtio-ports/{PORT} --statedir=/run \
            --pidfile=/run/debian.pid --daemonize </dev/null >/dev/null 2>&1"
        );
        vm.sh(&program);
        let mut debians = GuestSession::connect(&socket).unwrap();
        debians.wait_for_agent(limit()).unwrap();
        both_say_the_same(&mut agent, &mut debians);
    }
    vm.sh("umount /loop && losetup -d /dev/loop0 && umount /part");
    what_is_free_is_given_back(&mut vm, &mut agent, || fs::metadata(&image).unwrap().blocks());
    memory_blocks_say_what_becomes_of_them(&mut vm, &mut agent);
    keys_are_the_users(&mut vm, &mut agent);
    passwords_go_to_chpasswd(&mut vm, &mut agent);
    the_clock_is_set(&mut vm, &mut agent);
    vm.power_off();
}

/// The argument for a disk with one partition, and in it a filesystem.
fn partitioned(lab: &Lab) -> String {
    const START: u64 = 1 << 20;
    const SIZE: u64 = 16 << 20;
    let content = fs::read(lab.ext4("part.raw", SIZE)).unwrap();
    let image = lab.image("parts.raw", START + SIZE);
    let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
    file.write_all_at(&content, START).unwrap();
    // A master boot record: type 0x83, then the first sector and the number of sectors.
    let sectors = |bytes: u64| u32::try_from(bytes / 512).unwrap().to_le_bytes();
    let entry = [&[0, 0, 0, 0, 0x83, 0, 0, 0][..], &sectors(START), &sectors(SIZE)].concat();
    file.write_all_at(&entry, 446).unwrap();
    file.write_all_at(&[0x55, 0xAA], 510).unwrap();
    format!("{},serial=in-parts", image.display())
}

fn processors_go_and_come(vm: &mut Vm<'_>, agent: &mut GuestSession) {
    let vcpu = |number, online, can_offline| json!({"logical-id": number, "online": online, "can-offline": can_offline});
    assert_eq!(get(agent, "guest-get-vcpus"), json!([vcpu(0, true, false), vcpu(1, true, true)]));
    let set = |number, online| json!({"vcpus": [{"logical-id": number, "online": online}]});
    assert_eq!(ask(agent, "guest-set-vcpus", &set(1, false)), 1);
    assert_eq!(get(agent, "guest-get-vcpus")[1], vcpu(1, false, true));
    assert_eq!(vm.sh("cat /sys/devices/system/cpu/online"), "0");
    assert_eq!(get(agent, "guest-get-cpustats").as_array().unwrap().len(), 1);
    assert_eq!(ask(agent, "guest-set-vcpus", &set(1, true)), 1);
    assert_eq!(vm.sh("cat /sys/devices/system/cpu/online"), "0-1");
    let text = refused(agent, "guest-set-vcpus", &set(0, false));
    assert_eq!(text, "logical processor #0 can't be offlined");
}

fn interfaces_and_routes_are_told(vm: &mut Vm<'_>, agent: &mut GuestSession) {
    vm.sh(
        "ip link set lo up; ip addr add 192.0.2.7/24 dev lo label lo:1; ip -6 addr add fd00::7/64 dev lo; \
        ip route add 198.51.100.0/24 via 192.0.2.1",
    );
    let interfaces = get(agent, "guest-network-get-interfaces");
    let named = |name: &str| {
        let found = interfaces.as_array().unwrap().iter().find(|interface| interface["name"] == name);
        found.unwrap_or_else(|| panic!("no {name}: {interfaces}")).clone()
    };
    let lo = named("lo");
    assert_eq!(lo["hardware-address"], "00:00:00:00:00:00");
    let addresses = lo["ip-addresses"].as_array().unwrap();
    for (ip, kind, prefix) in [("127.0.0.1", "ipv4", 8), ("::1", "ipv6", 128), ("fd00::7", "ipv6", 64)] {
        let address = json!({"ip-address": ip, "ip-address-type": kind, "prefix": prefix});
        assert!(addresses.contains(&address), "{ip}: {lo}");
    }
    let counted = || lo["statistics"]["rx-bytes"].as_u64().unwrap();
    vm.sh("ping -c 1 127.0.0.1");
    let again = get(agent, "guest-network-get-interfaces");
    assert!(again[0]["statistics"]["rx-bytes"].as_u64().unwrap() > counted(), "{again}");
    assert_eq!(named("lo:1")["ip-addresses"][0]["ip-address"], "192.0.2.7");

    let routes = get(agent, "guest-network-get-route");
    let to = |destination: &str| {
        let found = routes.as_array().unwrap().iter().find(|route| route["destination"] == destination);
        found.unwrap_or_else(|| panic!("no route to {destination}: {routes}")).clone()
    };
    let route = to("198.51.100.0");
    assert_eq!((&route["gateway"], &route["mask"]), (&json!("192.0.2.1"), &json!("255.255.255.0")));
    assert_eq!(route["version"], 4);
    let local = to("::1");
    assert_eq!((&local["desprefixlen"], &local["version"]), (&json!("128"), &json!(6)));
    // RTF_LOCAL is the flags' highest bit, and no sign.
    let flags = local["flags"].as_u64().unwrap();
    assert!((1 << 31..1 << 32).contains(&flags), "{flags:#x}");
}

fn filesystems_and_disks_are_told(vm: &mut Vm<'_>, agent: &mut GuestSession) {
    let filesystems = get(agent, "guest-get-fsinfo");
    let [filesystem] = filesystems.as_array().unwrap().as_slice() else {
        panic!("/data is the only one: {filesystems}")
    };
    assert_eq!((&filesystem["name"], &filesystem["type"]), (&json!("vda"), &json!("ext4")));
    assert_eq!(filesystem["mountpoint"], "/data");
    let address = json!({"bus-type": "virtio", "bus": 0, "target": 0, "unit": 0, "serial": "precious",
        "dev": "/dev/vda", "pci-controller": {"domain": -1, "bus": -1, "slot": -1, "function": -1}});
    assert_eq!(filesystem["disk"], json!([address]));
    let sizes = vm.sh("stat -f -c '%b %f %a %S' /data");
    let sizes: Vec<u64> = sizes.split_whitespace().map(|size| size.parse().unwrap()).collect();
    let [blocks, free, available, size] = sizes[..] else { panic!("{sizes:?}") };
    assert_eq!(filesystem["total-bytes-privileged"], blocks * size);
    assert_eq!(filesystem["used-bytes"], (blocks - free) * size);
    assert_eq!(filesystem["total-bytes"], (blocks - free + available) * size);
    let disks = get(agent, "guest-get-disks");
    let expected = json!({"name": "/dev/vda", "partition": false, "dependencies": [], "address": address});
    assert!(disks.as_array().unwrap().contains(&expected), "{disks}");
}

/// Leaves both mounted.
fn partitions_and_loop_devices_are_told(vm: &mut Vm<'_>, agent: &mut GuestSession) {
    vm.sh("dd if=/dev/vdb1 of=/data/inner bs=1M 2>/dev/null && mkdir /part /loop && mount -t ext4 /dev/vdb1 /part \
        && modprobe loop && losetup /dev/loop0 /data/inner && mount -t ext4 /dev/loop0 /loop");
    let filesystems = get(agent, "guest-get-fsinfo");
    let on = |mountpoint: &str| {
        let found = filesystems.as_array().unwrap().iter().find(|info| info["mountpoint"] == mountpoint);
        found.unwrap_or_else(|| panic!("no {mountpoint}: {filesystems}")).clone()
    };
    let part = on("/part");
    assert_eq!((&part["name"], &part["disk"][0]["dev"]), (&json!("vdb1"), &json!("/dev/vdb1")));
    assert_eq!(part["disk"][0]["serial"], "in-parts");
    assert_eq!((&on("/loop")["name"], &on("/loop")["disk"]), (&json!("loop0"), &json!([])));
    let disks = get(agent, "guest-get-disks");
    for expected in [
        json!({"name": "/dev/vdb1", "partition": true, "dependencies": ["/dev/vdb"]}),
        json!({"name": "/dev/loop0", "partition": false, "dependencies": []}),
    ] {
        assert!(disks.as_array().unwrap().contains(&expected), "{disks}");
    }
}

fn counters_count(agent: &mut GuestSession) {
    assert_eq!(get(agent, "guest-get-cpustats").as_array().unwrap().len(), 2);
    let disks = get(agent, "guest-get-diskstats");
    let vda = disks.as_array().unwrap().iter().find(|disk| disk["name"] == "vda").unwrap();
    assert!(vda["stats"]["read-ios"].as_u64().unwrap() > 0, "{vda}");
    assert!(get(agent, "guest-get-load")["load1m"].as_f64().unwrap() >= 0.0);
    assert_eq!(get(agent, "guest-get-users"), json!([]));
    assert_eq!(get(agent, "guest-get-timezone"), json!({"zone": "UTC", "offset": 0}));
}

/// The reference's members are all there, with values of the same kind; what does not change is equal.
fn both_say_the_same(ours: &mut GuestSession, debians: &mut GuestSession) {
    for command in [
        "guest-get-fsinfo",
        "guest-get-disks",
        "guest-get-vcpus",
        "guest-network-get-interfaces",
        "guest-get-osinfo",
        "guest-get-diskstats",
        "guest-get-cpustats",
        "guest-get-host-name",
        "guest-get-timezone",
        "guest-get-users",
        "guest-get-memory-blocks",
        "guest-get-memory-block-info",
        "guest-fsfreeze-status",
        "guest-get-time",
    ] {
        let (mut ours, mut theirs) = (get(ours, command), get(debians, command));
        for value in [&mut ours, &mut theirs] {
            sort(value);
        }
        includes(&ours, &theirs, command);
    }
}

/// Lists whose order says nothing, by what identifies their elements.
fn sort(value: &mut Value) {
    let key = |element: &Value| -> (Option<u64>, String) {
        let number = ["logical-id", "phys-index", "cpu"].iter().find_map(|member| element[member].as_u64());
        let text = ["name", "ip-address"].iter().find_map(|member| element[member].as_str());
        (number, text.unwrap_or_default().to_owned())
    };
    match value {
        Value::Array(elements) => {
            elements.iter_mut().for_each(sort);
            elements.sort_by_key(key);
        }
        Value::Object(members) => members.values_mut().for_each(sort),
        _ => {}
    }
}

/// Counters and what depends on free space change from one question to the next.
fn changes(path: &str) -> bool {
    ["statistics", "stats", "cpustats", "-bytes", "get-time"].iter().any(|part| path.contains(part))
}

fn includes(ours: &Value, theirs: &Value, path: &str) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            let ours: BTreeMap<&String, &Value> = ours.iter().collect();
            for (name, theirs) in theirs {
                let ours = ours.get(name).unwrap_or_else(|| panic!("{path}.{name} is missing: {ours:?}"));
                includes(ours, theirs, &format!("{path}.{name}"));
            }
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            assert_eq!(ours.len(), theirs.len(), "{path}: {ours:?}\n{theirs:?}");
            for (index, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                includes(ours, theirs, &format!("{path}[{index}]"));
            }
        }
        (Value::Number(_), Value::Number(_)) if changes(path) => {}
        _ => assert_eq!(ours, theirs, "{path}"),
    }
}

fn what_is_free_is_given_back(vm: &mut Vm<'_>, agent: &mut GuestSession, blocks: impl Fn() -> u64) {
    vm.sh("dd if=/dev/urandom of=/data/junk bs=1M count=64 2>/dev/null && sync");
    let full = blocks();
    vm.sh("rm /data/junk && sync");
    let trimmed = get(agent, "guest-fstrim");
    let [path] = trimmed["paths"].as_array().unwrap().as_slice() else { panic!("{trimmed}") };
    assert_eq!(path["path"], "/data");
    assert!(path["trimmed"].as_u64().unwrap() >= 64 << 20, "{trimmed}");
    assert!(path["minimum"].is_u64(), "{trimmed}");
    let (full, empty) = (full * 512, blocks() * 512);
    assert!(empty + (48 << 20) < full, "the image shrinks: {full} to {empty}");
}

fn memory_blocks_say_what_becomes_of_them(vm: &mut Vm<'_>, agent: &mut GuestSession) {
    let blocks = get(agent, "guest-get-memory-blocks");
    let Some(last) = blocks.as_array().unwrap().last() else {
        return drop(refused(agent, "guest-get-memory-block-info", &Value::Null));
    };
    let size = get(agent, "guest-get-memory-block-info")["size"].as_u64().unwrap();
    assert!(size.is_power_of_two() && size >= 1 << 20, "{size}");
    // The kernel may be unable to move what is in it: then it says why, and the state stays.
    let index = last["phys-index"].as_u64().unwrap();
    let set = |online| json!({"mem-blks": [{"phys-index": index, "online": online}]});
    let response = ask(agent, "guest-set-memory-blocks", &set(false))[0].clone();
    let state = vm.sh(&format!("cat /sys/devices/system/memory/memory{index}/state"));
    match response["response"].as_str().unwrap() {
        "success" => assert_eq!(state, "offline"),
        "operation-failed" => {
            assert_eq!(state, "online");
            assert!(response["error-code"].as_i64().unwrap() > 0);
        }
        other => panic!("{other}"),
    }
    let response = ask(agent, "guest-set-memory-blocks", &set(true));
    assert_eq!(response, json!([{"phys-index": index, "response": "success"}]));
}

fn keys_are_the_users(vm: &mut Vm<'_>, agent: &mut GuestSession) {
    vm.sh("echo 'ann:x:1000:1001:Ann:/data/ann:/bin/sh' >>/etc/passwd; mkdir /data/ann; chown 1000:1001 /data/ann");
    let keys = |keys: &[&str]| json!({"username": "ann", "keys": keys});
    ask(agent, "guest-ssh-add-authorized-keys", &keys(&["ssh-ed25519 AAAA one", "ssh-ed25519 BBBB two"]));
    let modes = vm.sh("stat -c '%u %g %a' /data/ann/.ssh /data/ann/.ssh/authorized_keys");
    assert_eq!(modes, "1000 1001 700\n1000 1001 600");
    ask(agent, "guest-ssh-remove-authorized-keys", &keys(&["ssh-ed25519 AAAA one"]));
    let left = ask(agent, "guest-ssh-get-authorized-keys", &json!({"username": "ann"}));
    assert_eq!(left, json!({"keys": ["ssh-ed25519 BBBB two"]}));
    // What ann turns into a link leads to nobody else's file.
    vm.sh("echo secret >/data/secret; ln -sf /data/secret /data/ann/.ssh/authorized_keys");
    let text = refused(agent, "guest-ssh-get-authorized-keys", &json!({"username": "ann"}));
    assert!(text.starts_with("failed to read '/data/ann/.ssh/authorized_keys'"), "{text}");
    let mut replaced = keys(&["ssh-ed25519 CCCC three"]);
    replaced["reset"] = true.into();
    ask(agent, "guest-ssh-add-authorized-keys", &replaced);
    assert_eq!(vm.sh("cat /data/secret /data/ann/.ssh/authorized_keys"), "secret\nssh-ed25519 CCCC three");
}

/// The guest image has no chpasswd: a script in its place shows what it would get.
fn passwords_go_to_chpasswd(vm: &mut Vm<'_>, agent: &mut GuestSession) {
    let password = json!({"username": "ann", "password": "czNjcmV0", "crypted": false});
    let text = refused(agent, "guest-set-user-password", &password);
    assert_eq!(text, "child process has failed to set user password: No such file or directory");
    let becomes = |vm: &mut Vm<'_>, body: &str| {
        vm.sh(&format!("(echo '#!/bin/sh'; echo '{body}') >/usr/sbin/chpasswd; chmod +x /usr/sbin/chpasswd"));
    };
    becomes(vm, "(echo \"options: $*\"; cat) >/run/given");
    ask(agent, "guest-set-user-password", &password);
    assert_eq!(vm.sh("cat /run/given"), "options: \nann:s3cret");
    let crypted = json!({"username": "ann", "password": "JDYk", "crypted": true});
    ask(agent, "guest-set-user-password", &crypted);
    assert_eq!(vm.sh("cat /run/given"), "options: -e\nann:$6$");
    becomes(vm, "echo cannot >&2; exit 1");
    let text = refused(agent, "guest-set-user-password", &password);
    assert_eq!(text, "child process has failed to set user password: cannot\n");
}

fn the_clock_is_set(vm: &mut Vm<'_>, agent: &mut GuestSession) {
    const SECOND: i64 = 1_000_000_000;
    let time = 2_000_000_000 * SECOND;
    ask(agent, "guest-set-time", &json!({"time": time}));
    let now = get(agent, "guest-get-time").as_i64().unwrap();
    let passed = now - time;
    assert!(passed >= 0 && passed < i64::try_from(limit().as_nanos()).unwrap(), "{passed} ns later");
    assert_eq!(vm.sh("date +%Y"), "2033");
    let text = refused(agent, "guest-set-time", &json!({"time": 3_200_000_000 * SECOND}));
    assert_eq!(text, "Invalid time: Invalid argument");
}
