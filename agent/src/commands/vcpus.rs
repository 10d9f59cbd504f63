//! guest-get-vcpus and guest-set-vcpus: `/sys/devices/system/cpu` (Linux
//! `Documentation/ABI/testing/sysfs-devices-system-cpu`).

use protocol::{Args, Error};
use serde_json::{Value, json};

use super::failed;
use super::root::Root;
use crate::guest::Guest;
use crate::schema::{Command, Run, Type, optional, required};

const DIRECTORY: &str = "/sys/devices/system/cpu";

const VCPU: Type = Type::Object(&[
    required("logical-id", Type::Int),
    required("online", Type::Bool),
    optional("can-offline", Type::Bool),
]);

pub(crate) const COMMANDS: &[Command] = &[
    Command::new("guest-get-vcpus", "The processors, by number", Run::Worker(get_vcpus))
        .returns(Type::Array(&VCPU)),
    Command::new(
        "guest-set-vcpus",
        "Takes processors online or offline, in order; returns for how many it was done",
        Run::Worker(set_vcpus),
    )
    .takes(&[required("vcpus", Type::Array(&VCPU))])
    .returns(Type::Int),
];

fn get_vcpus(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    vcpus(&Root::guest())
}

fn vcpus(root: &Root) -> Result<Value, Error> {
    let numbers = root.numbered::<i64>(DIRECTORY, "cpu");
    let numbers = numbers.map_err(|error| failed(format_args!("open(\"{DIRECTORY}/\")"), &error))?;
    let vcpu = |&number: &i64| {
        let online = is_online(root, number);
        json!({"logical-id": number, "online": online.unwrap_or(true), "can-offline": online.is_some()})
    };
    Ok(numbers.iter().map(vcpu).collect())
}

/// `None` for a processor that is always online.
fn is_online(root: &Root, number: i64) -> Option<bool> {
    root.line(format!("{DIRECTORY}/cpu{number}/online")).map(|state| state != "0")
}

fn set_vcpus(_: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let vcpus = args.objects("vcpus")?.into_iter().map(|mut vcpu| {
        let wanted = (vcpu.int("logical-id")?, vcpu.bool("online")?);
        vcpu.optional_bool("can-offline")?;
        vcpu.finish().map(|()| wanted)
    });
    let vcpus: Vec<(i64, bool)> = vcpus.collect::<Result<_, _>>()?;
    args.finish()?;
    set_all(&Root::guest(), &vcpus).map(Value::from)
}

/// Stops at the first failure; that is an error only if nothing was done before it.
fn set_all(root: &Root, vcpus: &[(i64, bool)]) -> Result<usize, Error> {
    for (done, &(number, online)) in vcpus.iter().enumerate() {
        match set(root, number, online) {
            Err(error) if done == 0 => return Err(error),
            Err(_) => return Ok(done),
            Ok(()) => {}
        }
    }
    Ok(vcpus.len())
}

fn set(root: &Root, number: i64, online: bool) -> Result<(), Error> {
    let directory = format!("{DIRECTORY}/cpu{number}/");
    std::fs::read_dir(root.join(&directory))
        .map_err(|error| failed(format_args!("open(\"{directory}\")"), &error))?;
    match is_online(root, number) {
        Some(now) if now == online => Ok(()),
        Some(_) => {
            let state = if online { "1" } else { "0" };
            root.write(format!("{directory}online"), state)
                .map_err(|error| failed(format_args!("write(\"{directory}online\")"), &error))
        }
        None if online => Ok(()),
        None => Err(Error::generic(format!("logical processor #{number} can't be offlined"))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Eleven processors, of which the first cannot be taken offline.
    fn machine() -> (tempfile::TempDir, Root) {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::at(directory.path());
        for number in 0..=10 {
            let cpu = root.join(format!("{DIRECTORY}/cpu{number}"));
            fs::create_dir_all(&cpu).unwrap();
            if number > 0 {
                fs::write(cpu.join("online"), if number == 2 { "0\n" } else { "1\n" }).unwrap();
            }
        }
        fs::create_dir(root.join(format!("{DIRECTORY}/cpuidle"))).unwrap();
        (directory, root)
    }

    fn numbers(value: &Value, member: &str, wanted: bool) -> Vec<i64> {
        let all = value.as_array().unwrap().iter().filter(|vcpu| vcpu[member] == wanted);
        all.map(|vcpu| vcpu["logical-id"].as_i64().unwrap()).collect()
    }

    #[test]
    fn processors_are_listed_by_number() {
        let (_directory, root) = machine();
        let value = vcpus(&root).unwrap();
        Type::Array(&VCPU).check(&value).unwrap();
        assert_eq!(numbers(&value, "online", false), [2]);
        assert_eq!(numbers(&value, "can-offline", false), [0]);
        assert_eq!(numbers(&value, "online", true), [0, 1, 3, 4, 5, 6, 7, 8, 9, 10]);
    }

    #[test]
    fn processors_are_set_in_order_until_one_cannot_be() {
        let (_directory, root) = machine();
        assert_eq!(set_all(&root, &[]), Ok(0));
        assert_eq!(set_all(&root, &[(0, true), (1, false), (2, true), (2, true)]), Ok(4));
        assert_eq!(numbers(&vcpus(&root).unwrap(), "online", false), [1]);
        assert_eq!(set_all(&root, &[(3, false), (0, false), (4, false)]), Ok(1));
        assert_eq!(numbers(&vcpus(&root).unwrap(), "online", false), [1, 3]);
    }

    #[test]
    fn the_first_failure_is_an_error() {
        let (_directory, root) = machine();
        let desc = |number| set_all(&root, &[(number, false), (1, false)]).unwrap_err().desc;
        assert_eq!(desc(0), "logical processor #0 can't be offlined");
        let missing = "open(\"/sys/devices/system/cpu/cpu77/\"): No such file or directory";
        assert_eq!(desc(77), missing);
        assert!(desc(-1).contains("cpu-1/"));
    }

    #[test]
    fn without_the_directory_there_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let expected = "open(\"/sys/devices/system/cpu/\"): No such file or directory";
        assert_eq!(vcpus(&Root::at(directory.path())).unwrap_err().desc, expected);
    }
}
