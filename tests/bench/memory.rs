//! What a VMM takes of the host's memory, its guest's RAM aside.

use std::fs;
use std::time::Duration;

/// One mapping of a process, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Mapping {
    size: u64,
    pss: u64,
}

/// Proportional set size in KiB of all mappings of process `pid` but guest RAM, once it no longer changes.
///
/// Guest RAM is the fullest mapping of at least `ram_mib`. If it is larger than that, the kernel has merged something into
/// it, which is counted in full.
pub fn beyond_ram(pid: u32, ram_mib: u64) -> u64 {
    let mut last = None;
    loop {
        let mappings = parse(&fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap());
        let now = without_ram(&mappings, ram_mib << 10);
        if last == Some(now) {
            return now;
        }
        last = Some(now);
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn without_ram(mappings: &[Mapping], ram: u64) -> u64 {
    let guest = mappings.iter().filter(|mapping| mapping.size >= ram).max_by_key(|mapping| mapping.pss);
    let guest = guest.expect("guest RAM is mapped");
    let merged = (guest.size - ram).min(guest.pss);
    mappings.iter().map(|mapping| mapping.pss).sum::<u64>() - guest.pss + merged
}

fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let mut kib = || words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        match (first, mappings.last_mut()) {
            ("Size:", Some(mapping)) => mapping.size = kib(),
            ("Pss:", Some(mapping)) => mapping.pss = kib(),
            _ if !first.ends_with(':') => mappings.push(Mapping::default()),
            _ => {}
        }
    }
    mappings
}
