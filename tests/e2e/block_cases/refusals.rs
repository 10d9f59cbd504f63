//! Arguments, sizes and nodes that cannot be: refused in QEMU's words, with nothing changed.

use serde_json::{Value, json};

use super::MIB;
use super::machine::{Machine, mirror_arguments};
use crate::harness::Lab;

/// Case 18.
pub fn what_cannot_be_is_refused_in_known_words(lab: &Lab, machine: &mut Machine<'_>) {
    let source = lab.path("refused.raw");
    let [target, other, small] = [("to", 16), ("other", 16), ("small", 8)]
        .map(|(kind, mib)| lab.image(&format!("refused.{kind}"), mib * MIB));
    machine.io("refused", "w:1:0:1M");
    machine.add("refused-to", &target);
    let mut refusal = |device: &str, target: &str, more: &Value| {
        machine.monitor.refusal("blockdev-mirror", &mirror_arguments(device, target, more))
    };
    let range = "Parameter 'granularity' expects a value in range [512B, 64MB]";
    let power = "Parameter 'granularity' expects a power of 2";
    for (granularity, text) in [(511, range), (65537, power), (128 * MIB, range)] {
        assert_eq!(refusal("refused", "refused-to", &json!({"granularity": granularity})), text);
    }
    for (more, text) in [
        (json!({"sync": "incremental"}), "Sync mode 'incremental' not supported"),
        (json!({"sync": "zzz"}), "Parameter 'sync' does not accept value 'zzz'"),
        (json!({"buf-size": -1}), "Invalid parameter 'buf-size'"),
        (json!({"speed": -1}), "Parameter 'speed' expects a non-negative value"),
        (json!({"job-id": "1bad id"}), "Invalid job ID '1bad id'"),
        (json!({"no-such": 1}), "Parameter 'no-such' is unexpected"),
        (json!({"speed": "fast"}), "Invalid parameter type for 'speed', expected: integer"),
    ] {
        assert_eq!(refusal("refused", "refused-to", &more), text, "{more}");
    }
    let missing = |name: &str| format!("Cannot find device='{name}' nor node-name='{name}'");
    assert_eq!(refusal("absent", "refused-to", &json!({})), missing("absent"));
    assert_eq!(refusal("refused", "absent", &json!({})), missing("absent"));
    machine.has_no_jobs();

    a_target_of_another_size_fails_the_job(machine, &small);
    a_disk_has_one_mirror(machine, &other);
    assert_eq!(machine.file("refused"), source);
    machine.io("refused", "r:1:0:1M r:0:1M:15M");
    verbs_about_nothing(machine);
    machine.delete("refused-to");
}

/// The size is looked at when the job has begun.
fn a_target_of_another_size_fails_the_job(machine: &mut Machine<'_>, small: &std::path::Path) {
    machine.add("refused-small", small);
    machine.mirror("refused", "refused-small", &json!({}));
    let told = machine.told("null");
    let names = ["created", "running", "aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"];
    assert_eq!(told.names(), names);
    let error = told.data("BLOCK_JOB_COMPLETED")["error"].clone();
    assert_eq!(error, "Source and target image have different sizes");
    machine.delete("refused-small");
}

fn a_disk_has_one_mirror(machine: &mut Machine<'_>, other: &std::path::Path) {
    machine.add("refused-other", other);
    machine.mirror_until_ready("refused", "refused-to", &json!({}));
    let second = |id: &str| mirror_arguments("refused", "refused-other", &json!({"job-id": id}));
    let text = machine.monitor.refusal("blockdev-mirror", &second("m1"));
    assert_eq!(text, "Need a root block node");
    let text = machine
        .monitor
        .refusal("blockdev-mirror", &mirror_arguments("refused", "refused-to", &json!({"job-id": "m1"})));
    assert_eq!(text, "Need a root block node");
    assert!(machine.monitor.refusal("blockdev-del", &json!({"node-name": "refused-to"})).contains("in use"));
    machine.cancel(true);
    machine.told("null");
    machine.delete("refused-other");
}

/// Classes are what clients look at.
fn verbs_about_nothing(machine: &mut Machine<'_>) {
    let class = |machine: &mut Machine<'_>, command: &str, arguments: Value| {
        let error = machine.monitor.try_run(command, &arguments).unwrap_err();
        let refusal = error.refusal().unwrap();
        (json!(refusal.class), refusal.desc.clone())
    };
    for command in ["block-job-pause", "block-job-resume", "block-job-complete", "block-job-cancel"] {
        let (class, text) = class(machine, command, json!({"device": "m0"}));
        assert_eq!(
            (class, text.as_str()),
            (json!("DeviceNotActive"), "Block job 'm0' not found"),
            "{command}"
        );
    }
    for command in ["job-pause", "job-resume", "job-complete", "job-cancel", "job-finalize", "job-dismiss"] {
        let (class, text) = class(machine, command, json!({"id": "m0"}));
        assert_eq!((class, text.as_str()), (json!("GenericError"), "Job not found"), "{command}");
    }
}
