//! What the VM is made of, except its disks.

use protocol::Error;
use serde_json::{Value, json};

use super::super::schema::{EMPTY, Object, Type, required};
use super::super::vm::{ChardevInfo, CpuInfo};
use super::{Call, Command};

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "query-name",
        arguments: &EMPTY,
        returns: Type::Object(&NAME_INFO),
        run: |call| Ok(json!({"name": call.vm.name()})),
    },
    Command {
        name: "query-uuid",
        arguments: &EMPTY,
        returns: Type::Object(&UUID_INFO),
        run: |call| Ok(json!({"UUID": call.vm.uuid().to_string()})),
    },
    Command {
        name: "query-kvm",
        arguments: &EMPTY,
        returns: Type::Object(&KVM_INFO),
        run: |_| Ok(json!({"enabled": true, "present": true})),
    },
    Command {
        name: "query-current-machine",
        arguments: &EMPTY,
        returns: Type::Object(&CURRENT_MACHINE),
        run: |_| Ok(json!({"wakeup-suspend-support": true})),
    },
    Command {
        name: "query-cpus-fast",
        arguments: &EMPTY,
        returns: Type::Array(&Type::Object(&CPU_INFO)),
        run: query_cpus,
    },
    Command {
        name: "query-chardev",
        arguments: &EMPTY,
        returns: Type::Array(&Type::Object(&CHARDEV_INFO)),
        run: query_chardev,
    },
];

static NAME_INFO: Object = Object::new(&[required("name", Type::Str)]);
static UUID_INFO: Object = Object::new(&[required("UUID", Type::Str)]);
static KVM_INFO: Object = Object::new(&[required("enabled", Type::Bool), required("present", Type::Bool)]);
static CURRENT_MACHINE: Object = Object::new(&[required("wakeup-suspend-support", Type::Bool)]);
static CPU_INFO: Object = Object::new(&[
    required("cpu-index", Type::Int),
    required("qom-path", Type::Str),
    required("thread-id", Type::Int),
    required("props", Type::Object(&CPU_PROPERTIES)),
    required("target", Type::Enum(&["x86_64"])),
]);
static CPU_PROPERTIES: Object = Object::new(&[
    required("socket-id", Type::Int),
    required("core-id", Type::Int),
    required("thread-id", Type::Int),
]);
static CHARDEV_INFO: Object = Object::new(&[
    required("label", Type::Str),
    required("filename", Type::Str),
    required("frontend-open", Type::Bool),
]);

fn query_cpus(call: &mut Call<'_>) -> Result<Value, Error> {
    let cpu = |CpuInfo { index, thread_id, socket, core, thread }| {
        json!({
            "cpu-index": index,
            "qom-path": format!("/machine/unattached/cpu[{index}]"),
            "thread-id": thread_id,
            "props": {"socket-id": socket, "core-id": core, "thread-id": thread},
            "target": "x86_64",
        })
    };
    Ok(call.vm.cpus().into_iter().map(cpu).collect())
}

fn query_chardev(call: &mut Call<'_>) -> Result<Value, Error> {
    let chardev = |ChardevInfo { label, filename, frontend_open }| json!({"label": label, "filename": filename, "frontend-open": frontend_open});
    Ok(call.vm.chardevs().into_iter().map(chardev).collect())
}
