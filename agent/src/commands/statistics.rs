//! What the kernel counts: guest-get-load, guest-get-cpustats, guest-get-diskstats.

use protocol::{Args, Error, Map};
use serde_json::{Value, json};

use super::failed;
use super::root::{Root, digits};
use crate::guest::Guest;
use crate::schema::{Command, Field, Run, Type, optional, required};

const LOAD: Type = Type::Object(&[
    required("load1m", Type::Number),
    required("load5m", Type::Number),
    required("load15m", Type::Number),
]);

const CPU: Type = Type::Object(&[
    required("type", Type::Enum(&["linux"])),
    required("cpu", Type::Int),
    required("user", Type::Int),
    required("nice", Type::Int),
    required("system", Type::Int),
    required("idle", Type::Int),
    optional("iowait", Type::Int),
    optional("irq", Type::Int),
    optional("softirq", Type::Int),
    optional("steal", Type::Int),
    optional("guest", Type::Int),
    optional("guestnice", Type::Int),
]);

const DISK: Type = Type::Object(&[
    required("name", Type::Str),
    required("major", Type::Int),
    required("minor", Type::Int),
    required("stats", Type::Object(DISK_COUNTERS)),
]);

/// In the order of `/proc/diskstats` (Linux `Documentation/admin-guide/iostats.rst`).
const DISK_COUNTERS: &[Field] = &[
    optional("read-ios", Type::Int),
    optional("read-merges", Type::Int),
    optional("read-sectors", Type::Int),
    optional("read-ticks", Type::Int),
    optional("write-ios", Type::Int),
    optional("write-merges", Type::Int),
    optional("write-sectors", Type::Int),
    optional("write-ticks", Type::Int),
    optional("ios-pgr", Type::Int),
    optional("total-ticks", Type::Int),
    optional("weight-ticks", Type::Int),
    optional("discard-ios", Type::Int),
    optional("discard-merges", Type::Int),
    optional("discard-sectors", Type::Int),
    optional("discard-ticks", Type::Int),
    optional("flush-ios", Type::Int),
    optional("flush-ticks", Type::Int),
];

pub(crate) const COMMANDS: &[Command] = &[
    Command::new("guest-get-load", "Load averages over 1, 5 and 15 minutes", Run::Worker(get_load))
        .returns(LOAD),
    Command::new(
        "guest-get-cpustats",
        "Milliseconds each online processor spent on what",
        Run::Worker(get_cpustats),
    )
    .returns(Type::Array(&CPU)),
    Command::new("guest-get-diskstats", "Counters of each block device", Run::Worker(get_diskstats))
        .returns(Type::Array(&DISK)),
];

/// In the order of `/proc/stat` (proc(5)).
const CPU_TIMES: &[&str] =
    &["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guestnice"];
/// Of them those that every kernel has.
const CPU_TIMES_REQUIRED: usize = 4;
/// A tick of `/proc/stat` is 1/100 s (Linux `USER_HZ`).
const TICK_MILLISECONDS: u64 = 10;

fn get_load(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    Ok(load(rustix::system::sysinfo().loads))
}

/// From fixed-point numbers with 16 bits behind the point (Linux `SI_LOAD_SHIFT`).
fn load(averages: [u64; 3]) -> Value {
    let [one, five, fifteen] = averages.map(|average| {
        let whole = u32::try_from(average >> 16).unwrap_or(u32::MAX);
        let fraction = u32::from(u16::try_from(average & 0xFFFF).unwrap_or(u16::MAX));
        f64::from(whole) + f64::from(fraction) / 65536.0
    });
    json!({"load1m": one, "load5m": five, "load15m": fifteen})
}

fn get_cpustats(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    let path = "/proc/stat";
    let text =
        Root::guest().text(path).map_err(|error| failed(format_args!("failed to read {path}"), &error))?;
    Ok(text.lines().filter_map(cpu).collect())
}

/// A line like `cpu0 876284 38696 211812 421434 1781 0 278 1348 0 0`; `None` for all others.
fn cpu(line: &str) -> Option<Value> {
    let mut fields = line.split_ascii_whitespace();
    let number: u64 = digits(fields.next()?.strip_prefix("cpu")?)?;
    let mut stats = Map::from_iter([("type".into(), "linux".into()), ("cpu".into(), number.into())]);
    for (&name, field) in CPU_TIMES.iter().zip(fields) {
        let ticks: u64 = digits(field)?;
        stats.insert(name.into(), ticks.saturating_mul(TICK_MILLISECONDS).into());
    }
    CPU_TIMES[..CPU_TIMES_REQUIRED]
        .iter()
        .all(|&name| stats.contains_key(name))
        .then_some(Value::Object(stats))
}

fn get_diskstats(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    let path = "/proc/diskstats";
    let text =
        Root::guest().text(path).map_err(|error| failed(format_args!("failed to read {path}"), &error))?;
    Ok(text.lines().filter_map(disk).collect())
}

/// A line like `254 0 vda 14 0 2256 …`.
fn disk(line: &str) -> Option<Value> {
    let mut fields = line.split_ascii_whitespace();
    let major: u32 = digits(fields.next()?)?;
    let minor: u32 = digits(fields.next()?)?;
    let name = fields.next()?;
    let counters: Option<Map> = DISK_COUNTERS
        .iter()
        .zip(fields)
        .map(|(counter, field)| Some((counter.name().to_owned(), digits::<u64>(field)?.into())))
        .collect();
    Some(json!({"name": name, "major": major, "minor": minor, "stats": counters?}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_is_as_recorded() {
        let value = load([8256, 41216, 66592]);
        LOAD.check(&value).unwrap();
        assert_eq!(value, json!({"load1m": 0.1259765625, "load5m": 0.62890625, "load15m": 1.01611328125}));
        LOAD.check(&load([u64::MAX; 3])).unwrap();
    }

    #[test]
    fn processor_times_are_in_milliseconds() {
        let stats = cpu("cpu0 34905 40134 51767 187425 352 0 75 44 6 0").unwrap();
        CPU.check(&stats).unwrap();
        let recorded = json!({"cpu": 0, "guestnice": 0, "idle": 1_874_250, "steal": 440, "iowait": 3520,
            "system": 517_670, "guest": 60, "nice": 401_340, "irq": 0, "type": "linux", "user": 349_050,
            "softirq": 750});
        assert_eq!(stats, recorded);
        let old = cpu("cpu17 1 2 3 4").unwrap();
        CPU.check(&old).unwrap();
        assert_eq!(old.get("iowait"), None);
    }

    #[test]
    fn lines_about_no_single_processor_are_skipped() {
        for line in [
            "",
            "cpu  1 2 3 4",
            "cpu1",
            "cpu1 1 2 3",
            "cpu1 1 2 -3 4",
            "cpux 1 2 3 4",
            "intr 5",
            "cpu1 1 2 3 4 x",
        ] {
            assert_eq!(cpu(line), None, "{line}");
        }
        let most = cpu(&format!("cpu0 {0} {0} {0} {0} {0} 1 2 3 4 5 6 7 8", u64::MAX)).unwrap();
        CPU.check(&most).unwrap();
    }

    #[test]
    fn disk_counters_are_as_many_as_the_kernel_has() {
        let new = disk(" 254       0 vda 14 0 2256 1 36 116 4192 3 0 4 6 8 5 1024 7 9 2 99").unwrap();
        DISK.check(&new).unwrap();
        assert_eq!((&new["name"], &new["major"], &new["minor"]), (&json!("vda"), &json!(254), &json!(0)));
        assert_eq!(new["stats"].as_object().unwrap().len(), 17);
        assert_eq!((&new["stats"]["read-ios"], &new["stats"]["flush-ticks"]), (&json!(14), &json!(2)));
        let old = disk("8 1 sda1 1 2 3 4 5 6 7 8 9 10 11").unwrap();
        DISK.check(&old).unwrap();
        assert_eq!(old["stats"].as_object().unwrap().len(), 11);
        for line in ["", "8", "8 1", "x 1 sda 1", "8 1 sda 1 -2"] {
            assert_eq!(disk(line), None, "{line}");
        }
    }
}
