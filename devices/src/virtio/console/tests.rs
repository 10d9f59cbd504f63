use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::PortEvent::{GuestClosed, GuestOpened, Readable, Writable};
use super::*;
use crate::testing::{Buffer, FakeDriver, INDIRECT, NEXT, PATIENCE, Random, WILD_ADDRESS, WRITE};

const ALL: u64 = u64::MAX;
const SINGLE_PORT: u64 = !(1 << VIRTIO_CONSOLE_F_MULTIPORT);
const WITHOUT_EVENT_IDX: u64 = !(1 << 29);
const PAGE: u32 = 4096;
/// Port 0 is the console, ports 1 and 2 have names.
const CONSOLE: usize = 0;
const AGENT: usize = 1;
const AGENT_RX: usize = 4;
const AGENT_TX: usize = 5;

fn specs() -> Vec<PortSpec> {
    let named = |name: &str| PortSpec { name: Some(name.into()), console: false };
    vec![PortSpec { name: None, console: true }, named("org.qemu.guest_agent.0"), named("other")]
}

struct Rig {
    driver: FakeDriver,
    handle: ConsoleHandle,
}

/// (port, event, value, payload) as the guest reads it.
type Heard = (u32, u16, u16, Vec<u8>);

impl Rig {
    fn new() -> Self {
        let (console, handle) = Console::new(specs()).unwrap();
        Self { driver: FakeDriver::new(Box::new(console)), handle }
    }

    /// Probed, with buffers on the control queue, all doorbells answered.
    fn started(features: u64) -> Self {
        let mut rig = Self::new();
        rig.driver.start(features);
        if features & 1 << VIRTIO_CONSOLE_F_MULTIPORT != 0 {
            for _ in 0..16 {
                rig.driver.send(CONTROL_RX, &[Buffer::Writable(PAGE)]);
            }
        }
        rig.turn();
        rig
    }

    /// All ports introduced, as Linux does, and the agent port opened on both sides.
    fn connected(features: u64) -> Self {
        let mut rig = Self::started(features);
        rig.say(u32::MAX, 0, 1);
        rig.turn();
        for port in 0..3 {
            rig.say(port, 3, 1);
        }
        rig.turn();
        rig.say(0, 6, 1);
        rig.handle.set_host_open(AGENT, true);
        rig.say(1, 6, 1);
        assert_eq!(rig.turn(), [GuestOpened(CONSOLE), GuestOpened(AGENT)]);
        rig.hear();
        rig.driver.acknowledge();
        rig
    }

    /// The guest sends a control message.
    fn say(&mut self, port: u32, event: u16, value: u16) {
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        self.driver.send(CONTROL_TX, &[Buffer::Readable(&message)]);
    }

    /// What the guest has been told; the buffers go back.
    fn hear(&mut self) -> Vec<Heard> {
        self.driver.drain_used(CONTROL_TX);
        let mut heard = Vec::new();
        while let Some(used) = self.driver.take_used(CONTROL_RX) {
            let bytes = used.written();
            let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
            let port = u32::from(word(0)) | u32::from(word(2)) << 16;
            heard.push((port, word(4), word(6), bytes[HEADER..].to_vec()));
            self.driver.send(CONTROL_RX, &[Buffer::Writable(PAGE)]);
        }
        heard
    }

    /// One turn of the control loop: every doorbell that was rung is answered.
    fn turn(&mut self) -> Vec<PortEvent> {
        let mut events = Vec::new();
        for queue in 0..self.driver.transport().doorbells().len() {
            if self.driver.take_doorbell(queue) {
                events.extend(self.handle.doorbell(queue));
            }
        }
        events
    }

    fn read_all(&self, port: usize, step: usize) -> Vec<u8> {
        let mut all = Vec::new();
        let mut buffer = vec![0; step];
        loop {
            match self.handle.read(port, &mut buffer) {
                0 => return all,
                count => all.extend(&buffer[..count]),
            }
        }
    }
}

#[test]
fn a_linux_driver_is_introduced_to_every_port() {
    let mut rig = Rig::started(ALL);
    assert_eq!(rig.driver.config::<8>(0), [0, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(rig.hear(), []);
    rig.handle.set_host_open(AGENT, true);
    rig.handle.resize(Size { cols: 80, rows: 25 });
    rig.say(u32::MAX, 0, 1);
    assert_eq!(rig.turn(), []);
    let add = |port| (port, 1, 1, vec![]);
    assert_eq!(rig.hear(), [add(0), add(1), add(2)]);
    for port in 0..3 {
        rig.say(port, 3, 1);
    }
    rig.turn();
    assert_eq!(
        rig.hear(),
        [
            (0, 4, 1, vec![]),
            (0, 5, 1, vec![80, 0, 25, 0]),
            (1, 7, 1, b"org.qemu.guest_agent.0".to_vec()),
            (1, 6, 1, vec![]),
            (2, 7, 1, b"other".to_vec()),
        ]
    );
}

#[test]
fn the_guest_end_opens_and_closes() {
    let mut rig = Rig::connected(ALL);
    assert!(rig.handle.guest_open(AGENT) && !rig.handle.guest_open(2));
    rig.say(1, 6, 1);
    assert_eq!(rig.turn(), []);
    rig.say(1, 6, 0);
    rig.say(1, 6, 1);
    rig.say(2, 6, 1);
    rig.say(2, 6, 0);
    assert_eq!(rig.turn(), [GuestClosed(AGENT), GuestOpened(AGENT)]);
}

#[test]
fn the_last_words_come_before_the_closing_whatever_is_answered_first() {
    let mut rig = Rig::connected(ALL);
    rig.driver.send(AGENT_TX, &[Buffer::Readable(b"bye")]);
    rig.say(1, 6, 0);
    assert_eq!(rig.turn(), [Readable(AGENT), GuestClosed(AGENT), Readable(AGENT)]);
    assert_eq!(rig.read_all(AGENT, 10), b"bye");
}

#[test]
fn the_host_end_opens_and_closes_and_no_closing_is_lost() {
    let mut rig = Rig::connected(ALL);
    for open in [false, true] {
        rig.handle.set_host_open(AGENT, open);
        assert_eq!(rig.hear(), [(1, 6, u16::from(open), vec![])]);
        rig.turn();
    }
    rig.handle.set_host_open(AGENT, true);
    assert_eq!(rig.hear(), []);
    // The guest is slow with its buffers: 16 are used up, then it is told only what counts.
    for _ in 0..20 {
        rig.handle.set_host_open(AGENT, false);
        rig.handle.set_host_open(AGENT, true);
    }
    let heard = rig.hear();
    assert_eq!(heard.len(), 16);
    rig.turn();
    assert_eq!(rig.hear(), [(1, 6, 0, vec![]), (1, 6, 1, vec![])]);
}

#[test]
fn what_the_guest_sends_is_read_in_any_portions() {
    for features in [ALL, WITHOUT_EVENT_IDX] {
        let mut rig = Rig::connected(features);
        rig.driver.send(AGENT_TX, &[Buffer::Readable(b"{\"execute\""), Buffer::Readable(b":1}")]);
        rig.driver.send(AGENT_TX, &[Buffer::Readable(b"\n")]);
        assert_eq!(rig.turn(), [Readable(AGENT)]);
        let mut four = [0; 4];
        assert_eq!(rig.handle.read(AGENT, &mut four), 4);
        assert_eq!(&four, b"{\"ex");
        assert_eq!(rig.driver.drain_used(AGENT_TX), []);
        let before = rig.driver.line().count();
        assert_eq!(rig.read_all(AGENT, 5), b"ecute\":1}\n");
        assert_eq!(rig.driver.line().count(), before, "the guest hears of it when it has been handled");
        rig.handle.announce(AGENT);
        assert!(rig.driver.line().count() > before);
        assert_eq!(rig.driver.drain_used(AGENT_TX).len(), 2);
        assert_eq!(rig.turn(), []);
        assert_eq!(rig.handle.read(AGENT, &mut []), 0);
        // Drained, so the next one rings.
        rig.driver.send(AGENT_TX, &[Buffer::Readable(b"x")]);
        assert_eq!(rig.turn(), [Readable(AGENT)]);
    }
}

#[test]
fn a_host_end_that_does_not_read_leaves_the_buffers_with_the_guest() {
    let mut rig = Rig::connected(ALL);
    for _ in 0..DATA_QUEUE_SIZE {
        rig.driver.send(AGENT_TX, &[Buffer::Readable(&[7; 1000])]);
    }
    assert_eq!(rig.turn(), [Readable(AGENT)]);
    let mut some = [0; 100];
    assert_eq!(rig.handle.read(AGENT, &mut some), 100);
    assert_eq!(rig.turn(), []);
    assert_eq!(rig.driver.drain_used(AGENT_TX), []);
    rig.handle.ring(AGENT);
    assert_eq!(rig.turn(), [Readable(AGENT)]);
    assert_eq!(rig.read_all(AGENT, 64 << 10).len(), 1000 * usize::from(DATA_QUEUE_SIZE) - 100);
    assert_eq!(rig.driver.drain_used(AGENT_TX).len(), usize::from(DATA_QUEUE_SIZE));
}

#[test]
fn what_nobody_wants_is_discarded() {
    let mut rig = Rig::connected(ALL);
    rig.driver.send(1, &[Buffer::Readable(b"Linux version")]);
    assert_eq!(rig.turn(), [Readable(CONSOLE)]);
    assert_eq!(rig.handle.read(CONSOLE, &mut [0; 5]), 5);
    rig.driver.send(1, &[Buffer::Readable(b"6.1")]);
    rig.handle.discard(CONSOLE);
    assert_eq!(rig.driver.drain_used(1).len(), 2);
    assert_eq!(rig.turn(), [], "drained");
    rig.driver.send(1, &[Buffer::Readable(b"more")]);
    assert_eq!(rig.turn(), [Readable(CONSOLE)]);
}

#[test]
fn a_flood_is_discarded_in_bounded_calls_that_ask_for_the_next() {
    let mut rig = Rig::connected(ALL);
    for _ in 0..DATA_QUEUE_SIZE {
        rig.driver.send(1, &[Buffer::Readable(b"spam")]);
    }
    assert_eq!(rig.turn(), [Readable(CONSOLE)]);
    rig.handle.discard(CONSOLE);
    assert_eq!(rig.driver.drain_used(1).len(), usize::from(DATA_QUEUE_SIZE));
    rig.driver.send(1, &[Buffer::Readable(b"more spam")]);
    assert_eq!(rig.turn(), [Readable(CONSOLE)], "the doorbell was rung when the call had done its share");
    rig.handle.discard(CONSOLE);
    assert_eq!(rig.driver.drain_used(1).len(), 1);
}

#[test]
fn writing_fills_the_buffers_of_the_guest_and_waits_for_more() {
    for features in [ALL, WITHOUT_EVENT_IDX] {
        let mut rig = Rig::connected(features);
        assert_eq!(rig.handle.write(AGENT, b"hello"), 0);
        rig.driver.send(AGENT_RX, &[Buffer::Writable(3), Buffer::Writable(1)]);
        assert_eq!(rig.turn(), [Writable(AGENT)]);
        let before = rig.driver.line().count();
        assert_eq!(rig.handle.write(AGENT, b"hello"), 4);
        assert_eq!(rig.driver.take_used(AGENT_RX).unwrap().written(), b"hell");
        assert_eq!(rig.driver.line().count(), before + 1);
        assert_eq!(rig.handle.write(AGENT, b"o"), 0);
        rig.driver.send(AGENT_RX, &[Buffer::Writable(PAGE)]);
        assert_eq!(rig.turn(), [Writable(AGENT)]);
        assert_eq!(rig.handle.write(AGENT, b"o"), 1);
        assert_eq!(rig.driver.take_used(AGENT_RX).unwrap().written(), b"o");
        assert_eq!(rig.handle.write(AGENT, b""), 0);
    }
}

#[test]
fn nothing_is_written_to_a_port_that_the_guest_has_not_opened() {
    let mut rig = Rig::connected(ALL);
    rig.driver.send(6, &[Buffer::Writable(PAGE)]);
    assert_eq!(rig.turn(), []);
    assert_eq!(rig.handle.write(2, b"lost"), 0);
    rig.say(2, 6, 1);
    assert_eq!(rig.turn(), [GuestOpened(2)]);
    assert_eq!(rig.handle.write(2, b"found"), 5);
}

#[test]
fn a_driver_without_multiport_sees_the_console_alone() {
    let mut rig = Rig::new();
    rig.handle.resize(Size { cols: 132, rows: 50 });
    rig.driver.start(SINGLE_PORT);
    assert_eq!(rig.driver.acknowledge(), 2, "told of the size");
    assert_eq!(rig.driver.config::<4>(0), [132, 0, 50, 0]);
    assert_eq!(rig.turn(), [GuestOpened(CONSOLE)]);
    rig.driver.send(0, &[Buffer::Writable(PAGE)]);
    assert_eq!(rig.turn(), [Writable(CONSOLE)]);
    assert_eq!(rig.handle.write(CONSOLE, b"ls\n"), 3);
    rig.driver.send(1, &[Buffer::Readable(b"login:")]);
    assert_eq!(rig.turn(), [Readable(CONSOLE)]);
    assert_eq!(rig.read_all(CONSOLE, 100), b"login:");
    rig.driver.send(AGENT_TX, &[Buffer::Readable(b"?")]);
    assert_eq!(rig.turn(), []);
    assert_eq!(rig.handle.write(AGENT, b"?"), 0);
}

#[test]
fn a_driver_without_multiport_cannot_take_a_named_port_for_its_console() {
    let (console, handle) = Console::new(specs()[1..].to_vec()).unwrap();
    let mut rig = Rig { driver: FakeDriver::new(Box::new(console)), handle };
    rig.driver.start(SINGLE_PORT);
    rig.driver.send(1, &[Buffer::Readable(b"Linux version 6.1")]);
    assert_eq!(rig.turn(), []);
    assert_eq!(rig.driver.drain_used(1).len(), 1);
    assert!(!rig.handle.guest_open(0));
}

#[test]
fn a_resize_reaches_the_console_port_and_the_configuration_space() {
    let mut rig = Rig::connected(ALL);
    let generation = rig.driver.read(0xfc);
    rig.handle.resize(Size { cols: 100, rows: 40 });
    assert_ne!(rig.driver.read(0xfc), generation);
    assert_eq!(rig.driver.acknowledge() & 2, 2);
    assert_eq!(rig.hear(), [(0, 5, 1, vec![100, 0, 40, 0])]);
    assert_eq!(rig.driver.config::<2>(2), [40, 0]);
    assert_eq!(rig.driver.config::<8>(6), [0; 8]);
    assert_eq!(rig.driver.config::<8>(0xe00), [0; 8]);

    let mut without = Rig::connected(!(1 << VIRTIO_CONSOLE_F_SIZE));
    without.handle.resize(Size { cols: 100, rows: 40 });
    assert_eq!((without.hear(), without.driver.acknowledge()), (vec![], 0));
}

#[test]
fn a_port_is_unplugged_and_plugged_in_again() {
    let mut rig = Rig::connected(ALL);
    rig.handle.set_plugged(AGENT, false);
    assert_eq!(rig.hear(), [(1, 2, 1, vec![])]);
    rig.say(1, 6, 1);
    assert_eq!(rig.turn(), [GuestClosed(AGENT)]);
    assert!(!rig.handle.guest_open(AGENT));
    rig.handle.set_plugged(AGENT, true);
    assert_eq!(rig.hear(), [(1, 1, 1, vec![])]);
    rig.say(1, 3, 1);
    rig.turn();
    assert_eq!(rig.hear().len(), 2);
}

#[test]
fn a_reset_closes_the_guest_ends_and_forgets_half_read_data() {
    let mut rig = Rig::connected(ALL);
    rig.driver.send(AGENT_TX, &[Buffer::Readable(b"half")]);
    rig.turn();
    assert_eq!(rig.handle.read(AGENT, &mut [0; 2]), 2);
    rig.driver.reset();
    assert_eq!(rig.turn(), [GuestClosed(CONSOLE), GuestClosed(AGENT)]);
    assert_eq!(rig.handle.read(AGENT, &mut [0; 9]), 0);
    assert_eq!(rig.handle.write(AGENT, b"x"), 0);
    rig.handle.discard(AGENT);
    rig.handle.resize(Size { cols: 1, rows: 1 });
    rig.driver.start(ALL);
    rig.driver.send(CONTROL_RX, &[Buffer::Writable(PAGE)]);
    rig.driver.send(CONTROL_RX, &[Buffer::Writable(PAGE)]);
    // The guest wakes up: its driver knows its ports, does not say DEVICE_READY again, and one port was open.
    rig.say(1, 3, 1);
    rig.say(1, 6, 1);
    assert_eq!(rig.turn(), [GuestOpened(AGENT)]);
    let mut heard = Vec::new();
    while let more @ [_, ..] = &rig.hear()[..] {
        heard.extend_from_slice(more);
        rig.turn();
    }
    let name = b"org.qemu.guest_agent.0".to_vec();
    let add = |port| (port, 1, 1, vec![]);
    assert_eq!(heard, [add(0), (1, 7, 1, name), (1, 6, 1, vec![]), add(2)]);
}

#[test]
fn many_ports_have_their_queues() {
    let specs: Vec<_> =
        (0..MAX_PORTS).map(|n| PortSpec { name: Some(format!("port{n}")), console: n == 0 }).collect();
    let (console, handle) = Console::new(specs).unwrap();
    let mut rig = Rig { driver: FakeDriver::new(Box::new(console)), handle };
    rig.driver.start(ALL);
    rig.turn();
    let last = MAX_PORTS - 1;
    rig.driver.send(2 * last + 3, &[Buffer::Readable(b"end")]);
    assert_eq!(rig.turn(), [Readable(last)]);
    assert_eq!(rig.read_all(last, 10), b"end");
    assert_eq!(rig.handle.read(MAX_PORTS, &mut [0]), 0);
    assert_eq!(rig.handle.doorbell(1000), []);
}

#[test]
fn impossible_ports_are_refused() {
    let named = |name: &str| PortSpec { name: Some(name.into()), console: false };
    let error = |specs: Vec<PortSpec>| Console::new(specs).map(|_| ()).unwrap_err();
    assert_eq!(error(vec![]), SpecError::Count { count: 0 });
    assert_eq!(error(vec![PortSpec::default(); 32]), SpecError::Count { count: 32 });
    for name in ["", "a/b", "a\0b", "a\nb", &"x".repeat(256)] {
        assert_eq!(error(vec![named(name)]), SpecError::Name { name: name.into() });
    }
    assert_eq!(error(vec![named("a"), named("b"), named("a")]), SpecError::Duplicate { name: "a".into() });
}

#[test]
fn control_messages_that_make_no_sense_are_ignored() {
    let mut rig = Rig::connected(ALL);
    for (port, event, value) in [(3, 6, 1), (u32::MAX, 6, 1), (1 << 31, 3, 1), (1, 4, 1), (1, 99, 1)] {
        rig.say(port, event, value);
    }
    rig.driver.send(CONTROL_TX, &[Buffer::Readable(b"short")]);
    rig.driver.send(CONTROL_TX, &[Buffer::Readable(&[0xff; 4000])]);
    assert_eq!(rig.turn(), []);
    assert_eq!(rig.driver.drain_used(CONTROL_TX).len(), 7);
    assert!(!rig.driver.needs_reset());
}

#[test]
fn a_driver_that_repeats_itself_without_giving_buffers_costs_nothing() {
    let mut rig = Rig::new();
    rig.driver.start(ALL);
    rig.say(u32::MAX, 0, 1);
    for _ in 0..1000 {
        rig.say(1, 3, 1);
        rig.turn();
        rig.driver.drain_used(CONTROL_TX);
    }
    assert!(!rig.driver.needs_reset());
    for _ in 0..16 {
        rig.driver.send(CONTROL_RX, &[Buffer::Writable(PAGE)]);
    }
    rig.turn();
    assert_eq!(rig.hear().len(), 3, "two ports added, and the one it knows named");
}

#[test]
fn malformed_chains_need_a_reset_and_close_the_ports() {
    let bad: [(usize, &[Descriptor]); 8] = [
        (AGENT_TX, &[Descriptor::new(WILD_ADDRESS, 1, 0, 0)]),
        (AGENT_TX, &[Descriptor::new(0x1000, 0, 0, 0)]),
        (AGENT_TX, &[Descriptor::new(0x1000, 1, NEXT, 0)]),
        (AGENT_TX, &[Descriptor::new(0x1000, 1, WRITE, 0)]),
        (CONTROL_TX, &[Descriptor::new(0x1000, 8, NEXT, 1), Descriptor::new(0x1000, 8, WRITE, 0)]),
        (CONTROL_TX, &[Descriptor::new(0x1000, 8, INDIRECT, 0)]),
        (AGENT_RX, &[Descriptor::new(0x1000, 8, 0, 0)]),
        (CONTROL_RX, &[Descriptor::new(0x1000, 7, WRITE, 0)]),
    ];
    for (queue, descriptors) in bad {
        let mut rig = Rig::connected(ALL);
        rig.driver.send_raw(queue, descriptors);
        rig.turn();
        rig.handle.read(AGENT, &mut [0; 10]);
        rig.handle.write(AGENT, b"x");
        for _ in 0..20 {
            rig.handle.set_host_open(AGENT, false);
            rig.handle.set_host_open(AGENT, true);
        }
        assert!(rig.driver.needs_reset(), "{descriptors:?} on queue {queue}");
        rig.turn();
        assert!(!rig.handle.guest_open(AGENT));
        rig.driver.start(ALL);
    }
}

#[test]
fn an_index_that_jumps_needs_a_reset_on_every_queue() {
    for queue in 0..8 {
        let mut rig = Rig::connected(ALL);
        rig.say(2, 6, 1);
        rig.turn();
        let index = rig.driver.avail_idx(queue).wrapping_add(200);
        rig.driver.set_avail_idx(queue, index);
        rig.driver.ring(queue);
        rig.turn();
        for port in 0..3 {
            rig.say_open_and_use(port);
        }
        assert!(rig.driver.needs_reset(), "queue {queue}");
    }
}

#[test]
fn a_violation_reports_the_ports_as_closed() {
    let mut rig = Rig::connected(ALL);
    rig.driver.send_raw(AGENT_TX, &[Descriptor::new(WILD_ADDRESS, 1, 0, 0)]);
    assert_eq!(rig.turn(), [Readable(AGENT)]);
    assert_eq!(rig.handle.read(AGENT, &mut [0; 10]), 0);
    assert_eq!(rig.turn(), [GuestClosed(CONSOLE), GuestClosed(AGENT)]);
}

#[test]
fn a_violation_seen_by_the_transport_stops_the_device_too() {
    let mut rig = Rig::connected(ALL);
    rig.driver.send(AGENT_TX, &[Buffer::Readable(b"x")]);
    rig.driver.write(0x30, 0);
    rig.driver.write(0x44, 0);
    assert!(rig.driver.needs_reset());
    assert_eq!(rig.turn(), [GuestClosed(CONSOLE), GuestClosed(AGENT)]);
    assert_eq!(rig.handle.read(AGENT, &mut [0; 10]), 0);
}

#[test]
fn a_flood_of_tiny_buffers_is_bounded_per_call() {
    let mut rig = Rig::connected(ALL);
    let addr = rig.driver.allocate(16);
    let flood = |rig: &mut Rig| {
        rig.driver.write_descriptor(AGENT_TX, 0, Descriptor::new(addr, 1, 0, 0));
        for _ in 0..DATA_QUEUE_SIZE {
            rig.driver.publish(AGENT_TX, 0);
        }
        rig.driver.ring(AGENT_TX);
    };
    let mut total = 0;
    for _ in 0..10 {
        flood(&mut rig);
        total += rig.handle.read(AGENT, &mut [0; 4096]);
    }
    assert_eq!(total, 10 * usize::from(DATA_QUEUE_SIZE));
}

#[test]
fn random_guests_never_hang_or_panic() {
    let mut random = Random::new(20_240_607);
    for _ in 0..300 {
        let mut rig = Rig::connected(random.pick(&[ALL, WITHOUT_EVENT_IDX]));
        for _ in 0..40 {
            let queue = usize::from(random.below(8));
            let base = rig.driver.allocate(256);
            for index in 0..4 {
                let addr = random.pick(&[base, base, base, base + 8, WILD_ADDRESS]);
                let len = random.pick(&[8, 8, 8, 64, 1, 0, u32::MAX]);
                let flags = random.pick(&[0, WRITE, WRITE, NEXT, NEXT | WRITE, INDIRECT]);
                rig.driver.write_descriptor(queue, index, Descriptor::new(addr, len, flags, random.below(5)));
            }
            match random.below(12) {
                0 => rig.driver.set_avail_idx(queue, random.below(u16::MAX)),
                1 => rig.handle.set_host_open(AGENT, random.below(2) == 0),
                2 => rig.say_open_and_use(random.below(3).into()),
                3 => rig.handle.set_plugged(usize::from(random.below(4)), random.below(2) == 0),
                4 => rig.handle.discard(usize::from(random.below(4))),
                5 => rig.handle.resize(Size { cols: 1, rows: random.below(100) }),
                _ => rig.driver.publish(queue, random.below(5)),
            }
            rig.driver.ring(queue);
            for event in rig.turn() {
                let (Readable(port) | Writable(port) | GuestOpened(port) | GuestClosed(port)) = event;
                rig.handle.read(port, &mut [0; 100]);
                rig.handle.write(port, &[0; 100]);
            }
            if random.below(20) == 0 {
                rig.driver.start(ALL);
            }
        }
    }
}

impl Rig {
    /// Uses every queue of a port and the control queues.
    fn say_open_and_use(&mut self, port: usize) {
        for open in [true, false] {
            self.handle.set_host_open(port, open);
        }
        self.handle.read(port, &mut [0; 10]);
        self.handle.write(port, b"x");
        self.handle.doorbell(CONTROL_TX);
        for queue in [rx_queue(port), rx_queue(port) + 1] {
            self.handle.doorbell(queue);
        }
    }
}

/// A control loop that sends back what it reads, and relies on events alone.
fn echo(handle: &ConsoleHandle, doorbells: &[Arc<EventFd>], total: usize) {
    let epoll = Epoll::new().unwrap();
    for (queue, doorbell) in (0u64..).zip(doorbells) {
        let event = EpollEvent::new(EventSet::IN, queue);
        epoll.ctl(ControlOperation::Add, doorbell.as_raw_fd(), event).unwrap();
    }
    let mut held = Vec::new();
    let mut echoed = 0;
    while echoed < total {
        let mut ready = vec![EpollEvent::default(); 8];
        let patience = i32::try_from(PATIENCE.as_millis()).unwrap();
        let count = epoll.wait(patience, &mut ready).unwrap();
        assert_ne!(count, 0, "a wake-up was missed after {echoed} of {total} bytes");
        for event in &ready[..count] {
            let queue = usize::try_from(event.data()).unwrap();
            let _ = doorbells[queue].read();
            handle.doorbell(queue);
        }
        loop {
            if held.is_empty() {
                held.resize(37, 0);
                let count = handle.read(AGENT, &mut held);
                held.truncate(count);
            }
            let count = handle.write(AGENT, &held);
            held.drain(..count);
            echoed += count;
            if count == 0 {
                break;
            }
        }
    }
}

#[test]
fn no_wake_up_is_missed_in_either_direction() {
    const MESSAGES: usize = 20_000;
    for features in [ALL, WITHOUT_EVENT_IDX] {
        let mut rig = Rig::connected(features);
        let sent: Vec<u8> = (0..=250).cycle().take(7 * MESSAGES).collect();
        let handle = rig.handle.clone();
        let doorbells = rig.driver.transport().doorbells().to_vec();
        let total = sent.len();
        let control_loop = std::thread::spawn(move || echo(&handle, &doorbells, total));

        for _ in 0..4 {
            rig.driver.send(AGENT_RX, &[Buffer::Writable(5)]);
        }
        let mut received: Vec<u8> = Vec::new();
        let mut messages = sent.chunks(7);
        let mut room = usize::from(DATA_QUEUE_SIZE);
        while received.len() < total {
            let seen = rig.driver.line().count();
            let mut idle = true;
            while room > 0
                && let Some(message) = messages.next()
            {
                rig.driver.send(AGENT_TX, &[Buffer::Readable(message)]);
                room -= 1;
            }
            for used in rig.driver.drain_used(AGENT_RX) {
                received.extend(used.written());
                rig.driver.send(AGENT_RX, &[Buffer::Writable(5)]);
                idle = false;
            }
            let back = rig.driver.drain_used(AGENT_TX).len();
            room += back;
            if idle && back == 0 {
                rig.driver.line().wait_for(seen + 1);
            }
        }
        control_loop.join().unwrap();
        assert!(received == sent);
    }
}

#[test]
fn no_wake_up_is_missed_in_lock_step() {
    // One buffer at a time, sent the moment the last one is back: just when the device decides to sleep.
    const ROUNDS: usize = 5_000;
    for features in [ALL, WITHOUT_EVENT_IDX] {
        let mut rig = Rig::connected(features);
        let handle = rig.handle.clone();
        let doorbells = rig.driver.transport().doorbells().to_vec();
        let control_loop = std::thread::spawn(move || echo(&handle, &doorbells, ROUNDS));
        for round in 0..ROUNDS {
            rig.driver.send(AGENT_TX, &[Buffer::Readable(&[7])]);
            let start = Instant::now();
            let mut sent = false;
            let mut supplied = false;
            loop {
                sent |= rig.driver.take_used(AGENT_TX).is_some();
                if sent && !supplied {
                    rig.driver.send(AGENT_RX, &[Buffer::Writable(1)]);
                    supplied = true;
                }
                if supplied && rig.driver.take_used(AGENT_RX).is_some() {
                    break;
                }
                assert!(start.elapsed() < PATIENCE, "a wake-up was missed in round {round}");
                std::hint::spin_loop();
            }
        }
        control_loop.join().unwrap();
    }
}

#[test]
fn a_guest_that_resets_at_any_time_races_with_nobody() {
    let mut rig = Rig::new();
    let handle = rig.handle.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let control_loop = std::thread::spawn(move || {
        let mut open = [false; 3];
        while !stopped.load(Ordering::Acquire) {
            for queue in 0..8 {
                for event in handle.doorbell(queue) {
                    match event {
                        GuestOpened(port) => assert!(!std::mem::replace(&mut open[port], true)),
                        GuestClosed(port) => assert!(std::mem::replace(&mut open[port], false)),
                        Readable(port) => handle.discard(port),
                        Writable(port) => assert!(handle.write(port, b"x") < 2),
                    }
                }
            }
        }
    });
    for _ in 0..300 {
        rig.driver.start(ALL);
        rig.say(u32::MAX, 0, 1);
        for port in 0..3 {
            rig.say(port, 6, 1);
            rig.driver.send(rx_queue(1), &[Buffer::Writable(1)]);
            rig.driver.send(rx_queue(1) + 1, &[Buffer::Readable(b"x")]);
        }
        assert!(!rig.driver.needs_reset());
        rig.driver.reset();
        // Nothing is touched after a reset.
        let before: Vec<u8> = memory_of_the_rings(&rig.driver);
        assert!(before == memory_of_the_rings(&rig.driver));
    }
    stop.store(true, Ordering::Release);
    control_loop.join().unwrap();
}

#[test]
fn a_full_reader_is_refilled_by_halves_not_page_by_page() {
    for (features, doorbells) in [(ALL, 1), (WITHOUT_EVENT_IDX, 8)] {
        let mut rig = Rig::connected(features);
        for _ in 0..8 {
            rig.driver.send(AGENT_RX, &[Buffer::Writable(PAGE)]);
        }
        rig.turn();
        let data = vec![7; 16 * PAGE as usize];
        assert_eq!(rig.handle.write(AGENT, &data), 8 * PAGE as usize);
        assert_eq!(rig.handle.write(AGENT, &data), 0);
        // The reader takes all there is, page after page, and then waits.
        let mut rung = 0;
        for _ in 0..8 {
            assert_eq!(rig.driver.take_used(AGENT_RX).unwrap().data.len(), PAGE as usize);
            rig.driver.send(AGENT_RX, &[Buffer::Writable(PAGE)]);
            rung += usize::from(rig.driver.take_doorbell(AGENT_RX));
        }
        assert_eq!(rung, doorbells, "{features:#x}");
        assert_eq!(rig.handle.doorbell(AGENT_RX), [Writable(AGENT)]);
        assert_eq!(rig.handle.write(AGENT, &data), 8 * PAGE as usize);
    }
}

#[test]
fn a_reader_with_one_buffer_is_heard_at_once() {
    let mut rig = Rig::connected(ALL);
    for _ in 0..5 {
        assert_eq!(rig.handle.write(AGENT, b"next"), 0);
        rig.driver.send(AGENT_RX, &[Buffer::Writable(PAGE)]);
        assert_eq!(rig.turn(), [Writable(AGENT)]);
        assert_eq!(rig.handle.write(AGENT, b"next"), 4);
        assert_eq!(rig.driver.take_used(AGENT_RX).unwrap().written(), b"next");
    }
}

fn memory_of_the_rings(driver: &FakeDriver) -> Vec<u8> {
    let mut rings = vec![0; 8 << 16];
    driver.memory().read_slice(&mut rings, GuestAddress(1 << 20)).unwrap();
    rings
}
