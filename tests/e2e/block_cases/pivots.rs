//! Pivots back and forth under a guest that writes, reads, zeroes, discards and flushes all the time, and checks every
//! byte it reads against what it wrote.

use std::path::Path;
use std::time::Instant;

use coordinator::record::witness::Witness;
use serde_json::json;

use super::MIB;
use super::machine::{Machine, assert_same};
use crate::harness::Lab;

/// Case 15 on the way: each mirror begins while writes are in flight, with both images compared when it is pending.
pub fn a_guest_that_checks_its_data_pivots_back_and_forth(lab: &Lab, machine: &mut Machine<'_>) {
    let rounds = if std::env::var("TARN_SOAK").is_ok_and(|value| value == "1") { 500 } else { 50 };
    let start = Instant::now();
    let images = [lab.path("load.raw"), lab.image("load.other", 8 * MIB)];
    let load = machine.begin("load", "load 1 4 /run/load.stop");
    if !machine.is_reference() {
        // Some take longer than others, so that more is in flight, and ends in another order.
        let slow = json!({"device": "load", "op": "write", "sector": 8192, "sectors": 4096, "delay-ms": 3});
        machine.monitor.run_with("tarn-fault-add", &slow);
    }
    let mut former: Option<String> = None;
    for round in 0..rounds {
        let [from, to] = [&images[round % 2], &images[(round + 1) % 2]];
        let node = format!("load-{round}");
        machine.add(&node, to);
        let mode = if round % 4 < 2 { "background" } else { "write-blocking" };
        let with_witness = round % 5 == 4 && !machine.is_reference();
        let by_hand = !with_witness;
        let options = json!({"copy-mode": mode, "auto-finalize": !by_hand, "auto-dismiss": !by_hand});
        machine.mirror("load", &node, &options);
        machine.told("BLOCK_JOB_READY");
        if with_witness {
            pivots_with_a_witness(machine, &lab.path("load.witness"), round);
        } else {
            machine.complete_until_pending();
            assert_same(from, to);
            machine.finalize();
        }
        assert_eq!(&machine.file("load"), to, "round {round}");
        assert!(!machine.is_over(&load), "the load goes on");
        if let Some(former) = former.replace(node) {
            machine.delete(&former);
        }
    }
    machine.sh("touch /run/load.stop");
    let steps: u64 = machine.end(load).trim().parse().unwrap();
    eprintln!("{steps} operations of the guest in {rounds} pivots, {:?}", start.elapsed());
    assert!(steps > 0);
}

/// Tarn's own way.
fn pivots_with_a_witness(machine: &mut Machine<'_>, witness: &Path, round: usize) {
    Witness::create(witness).unwrap();
    let op = format!("22222222-2222-4222-8222-{round:012}");
    let pivot = json!({"op": op, "gen": round, "jobs": ["m0"], "witness": witness});
    let info = machine.monitor.run_with("tarn-pivot", &pivot);
    assert_eq!((&info["state"], &info["witness"]), (&json!("pivoted"), &json!("durable")));
    machine.told("null");
    Witness::remove(witness).unwrap();
}
