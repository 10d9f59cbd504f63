//! guest-get-memory-blocks, guest-set-memory-blocks and guest-get-memory-block-info:
//! `/sys/devices/system/memory` (Linux `Documentation/admin-guide/mm/memory-hotplug.rst`).

use std::io::ErrorKind;

use protocol::{Args, Error, Map};
use serde_json::{Value, json};

use super::failed;
use super::root::Root;
use crate::guest::Guest;
use crate::schema::{Command, Run, Type, optional, required};

const DIRECTORY: &str = "/sys/devices/system/memory";

const BLOCK: Type = Type::Object(&[
    required("phys-index", Type::Int),
    required("online", Type::Bool),
    optional("can-offline", Type::Bool),
]);

const RESPONSE: Type = Type::Object(&[
    required("phys-index", Type::Int),
    required(
        "response",
        Type::Enum(&["success", "not-found", "operation-not-supported", "operation-failed"]),
    ),
    optional("error-code", Type::Int),
]);

const INFO: Type = Type::Object(&[required("size", Type::Int)]);

pub(crate) const COMMANDS: &[Command] = &[
    Command::new("guest-get-memory-blocks", "The blocks of memory, by number", Run::Worker(get_blocks))
        .returns(Type::Array(&BLOCK)),
    Command::new(
        "guest-set-memory-blocks",
        "Takes blocks of memory online or offline; returns what became of each",
        Run::Worker(set_blocks),
    )
    .takes(&[required("mem-blks", Type::Array(&BLOCK))])
    .returns(Type::Array(&RESPONSE)),
    Command::new("guest-get-memory-block-info", "Bytes of each block of memory", Run::Worker(get_info))
        .returns(INFO),
];

fn get_blocks(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    blocks(&Root::guest())
}

/// None where the kernel cannot take memory offline.
fn blocks(root: &Root) -> Result<Value, Error> {
    let numbers = match root.numbered::<u64>(DIRECTORY, "memory") {
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        numbers => numbers.map_err(|error| failed(format_args!("open(\"{DIRECTORY}/\")"), &error))?,
    };
    let block = |&number: &u64| {
        // A block that went away in the meantime has no state.
        let mut block = Map::from_iter([
            ("phys-index".into(), number.into()),
            ("online".into(), (state(root, number)? == "online").into()),
        ]);
        if let Some(removable) = root.line(format!("{DIRECTORY}/memory{number}/removable")) {
            block.insert("can-offline".into(), (removable != "0").into());
        }
        Some(Value::Object(block))
    };
    Ok(numbers.iter().filter_map(block).collect())
}

fn state(root: &Root, number: u64) -> Option<String> {
    root.line(format!("{DIRECTORY}/memory{number}/state"))
}

fn set_blocks(_: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let blocks = args.objects("mem-blks")?.into_iter().map(|mut block| {
        let wanted = (block.uint("phys-index")?, block.bool("online")?);
        block.optional_bool("can-offline")?;
        block.finish().map(|()| wanted)
    });
    let blocks: Vec<(u64, bool)> = blocks.collect::<Result<_, _>>()?;
    args.finish()?;
    let root = Root::guest();
    Ok(blocks.into_iter().map(|(number, online)| set(&root, number, online)).collect())
}

/// What became of it: the kernel may be unable to move what is in the block.
fn set(root: &Root, number: u64, online: bool) -> Value {
    if !root.has(format!("{DIRECTORY}/memory{number}")) {
        return json!({"phys-index": number, "response": "not-found"});
    }
    let wanted = if online { "online" } else { "offline" };
    match state(root, number) {
        None => json!({"phys-index": number, "response": "operation-not-supported"}),
        Some(state) if state == wanted => json!({"phys-index": number, "response": "success"}),
        Some(_) => match root.write(format!("{DIRECTORY}/memory{number}/state"), wanted) {
            Ok(()) => json!({"phys-index": number, "response": "success"}),
            Err(error) => {
                let code = error.raw_os_error().unwrap_or(libc::EIO);
                json!({"phys-index": number, "response": "operation-failed", "error-code": code})
            }
        },
    }
}

fn get_info(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    info(&Root::guest())
}

fn info(root: &Root) -> Result<Value, Error> {
    // A kernel without memory hotplug lacks the directory, and the reference's error names that.
    root.names(DIRECTORY).map_err(|error| failed(format_args!("open(\"{DIRECTORY}/\")"), &error))?;
    let path = format!("{DIRECTORY}/block_size_bytes");
    let text = root.text(&path).map_err(|error| failed(format_args!("failed to read {path}"), &error))?;
    let size = u64::from_str_radix(text.trim().trim_start_matches("0x"), 16);
    size.map(|size| json!({"size": size})).map_err(|_| Error::generic(format!("{path} has no number")))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn machine() -> (tempfile::TempDir, Root) {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::at(directory.path());
        let block = |number: u64, files: &[(&str, &str)]| {
            let block = root.join(format!("{DIRECTORY}/memory{number}"));
            fs::create_dir_all(&block).unwrap();
            for (name, content) in files {
                fs::write(block.join(name), content).unwrap();
            }
        };
        block(0, &[("state", "online\n"), ("removable", "0\n")]);
        block(32, &[("state", "online\n"), ("removable", "1\n")]);
        block(4, &[("state", "offline\n")]);
        block(5, &[]);
        fs::write(root.join(format!("{DIRECTORY}/block_size_bytes")), "8000000\n").unwrap();
        fs::write(root.join(format!("{DIRECTORY}/auto_online_blocks")), "offline\n").unwrap();
        (directory, root)
    }

    #[test]
    fn blocks_are_listed_by_number() {
        let (_directory, root) = machine();
        let value = blocks(&root).unwrap();
        Type::Array(&BLOCK).check(&value).unwrap();
        let expected = json!([
            {"phys-index": 0, "online": true, "can-offline": false},
            {"phys-index": 4, "online": false},
            {"phys-index": 32, "online": true, "can-offline": true},
        ]);
        assert_eq!(value, expected);
        let size = info(&root).unwrap();
        INFO.check(&size).unwrap();
        assert_eq!(size, json!({"size": 134_217_728}));
    }

    #[test]
    fn each_block_gets_its_response() {
        let (_directory, root) = machine();
        let check = |number, online, response: &str| {
            let value = set(&root, number, online);
            RESPONSE.check(&value).unwrap();
            assert_eq!(value, json!({"phys-index": number, "response": response}));
        };
        check(32, false, "success");
        assert_eq!(state(&root, 32).unwrap(), "offline");
        check(4, false, "success");
        check(77, true, "not-found");
        check(u64::MAX, true, "not-found");
        check(5, true, "operation-not-supported");
    }

    #[test]
    fn a_refusal_of_the_kernel_gives_its_number() {
        let (_directory, root) = machine();
        let state = root.join(format!("{DIRECTORY}/memory0/state"));
        fs::remove_file(&state).unwrap();
        std::os::unix::fs::symlink("/dev/full", &state).unwrap();
        let value = set(&root, 0, false);
        RESPONSE.check(&value).unwrap();
        let expected = json!({"phys-index": 0, "response": "operation-failed", "error-code": libc::ENOSPC});
        assert_eq!(value, expected);
    }

    #[test]
    fn without_the_directory_there_are_no_blocks_and_no_size() {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::at(directory.path());
        assert_eq!(blocks(&root).unwrap(), json!([]));
        let expected = "open(\"/sys/devices/system/memory/\"): No such file or directory";
        assert_eq!(info(&root).unwrap_err().desc, expected);
        fs::create_dir_all(root.join(DIRECTORY)).unwrap();
        fs::write(root.join(format!("{DIRECTORY}/block_size_bytes")), "0x1g\n").unwrap();
        assert!(info(&root).is_err());
    }
}
