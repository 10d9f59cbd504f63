//! What the figures depend on: versions, the machine, the day.

use std::fs;
use std::process::Command;

use serde_json::{Map, Value, json};

use crate::Args;

/// Everything that is known; what is not is left out.
pub fn gather(args: &Args) -> Value {
    let mut facts = Map::new();
    let mut add = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            facts.insert(name.to_owned(), value);
        }
    };
    add("date", output("date", &["-u", "+%FT%TZ"]));
    add("host-kernel", output("uname", &["-r"]));
    add("processor", field("/proc/cpuinfo", "model name"));
    add("processors", std::thread::available_parallelism().ok().map(|count| json!(count.get())));
    add("memory", field("/proc/meminfo", "MemTotal"));
    add("hardware-virtualization", Some(json!(vmm::host::hardware_virtualization())));
    add("emulated", Some(json!(std::path::Path::new("/run/with-kvm").exists())));
    add("tarn", output(&args.tarn.to_string_lossy(), &["--version"]));
    add("qemu", output("qemu-system-x86_64", &["--version"]));
    let manifest = fs::read_to_string(args.image.join("manifest.json")).ok();
    add("guest-image", manifest.and_then(|text| serde_json::from_str(&text).ok()));
    for fact in &args.fact {
        if let Some((name, text)) = fact.split_once('=') {
            add(name, Some(json!(text)));
        }
    }
    Value::Object(facts)
}

/// First line of what a command prints.
fn output(program: &str, args: &[&str]) -> Option<Value> {
    let output = Command::new(program).args(args).output().ok().filter(|output| output.status.success())?;
    Some(json!(String::from_utf8_lossy(&output.stdout).lines().next()?))
}

/// `NAME : VALUE` in a file of /proc.
fn field(path: &str, name: &str) -> Option<Value> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(json!(line.split_once(':')?.1.trim()))
}
