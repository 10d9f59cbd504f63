//! Block nodes: images by name, and new images.

use block::{Cache, EngineKind};
use protocol::{Args, Error};
use serde_json::Value;

use super::super::fds::FdSets;
use super::super::schema::{EMPTY, Object, Type, Variants, optional, required};
use super::super::vm::BlockLayer;
use super::{Call, Command, nothing};
use crate::jobs::create::{Preallocation, plain};
use crate::jobs::mirror::devices;
use crate::jobs::nodes::{NodeSource, NodeSpec};

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "blockdev-add",
        arguments: &BLOCKDEV_ADD,
        returns: Type::Object(&EMPTY),
        run: blockdev_add,
    },
    Command {
        name: "blockdev-del",
        arguments: &BLOCKDEV_DEL,
        returns: Type::Object(&EMPTY),
        run: blockdev_del,
    },
    Command {
        name: "blockdev-create",
        arguments: &BLOCKDEV_CREATE,
        returns: Type::Object(&EMPTY),
        run: blockdev_create,
    },
];

/// `raw` says that the image is one; `file` and `host_device` alone mean the same here.
static BLOCKDEV_ADD: Object = Object {
    members: &[
        required("driver", Type::Enum(&["raw", "file", "host_device"])),
        optional("node-name", Type::Str),
        optional("discard", Type::Enum(&["ignore", "unmap"])),
        optional("cache", Type::Object(&CACHE)),
        optional("read-only", Type::Bool),
        optional("auto-read-only", Type::Bool),
        optional("detect-zeroes", Type::Enum(&["off"])),
    ],
    variants: Some(Variants {
        tag: "driver",
        cases: &[("raw", &RAW), ("file", &FILE), ("host_device", &FILE)],
    }),
};
static RAW: Object = Object::new(&[required("file", Type::Object(&PROTOCOL))]);
static PROTOCOL: Object = Object::new(&[
    required("driver", Type::Enum(&["file", "host_device"])),
    required("filename", Type::Str),
    optional("aio", Type::Enum(AIO)),
    optional("locking", Type::Enum(ON_OFF_AUTO)),
    optional("discard", Type::Enum(&["ignore", "unmap"])),
    optional("cache", Type::Object(&CACHE)),
    optional("read-only", Type::Bool),
    optional("auto-read-only", Type::Bool),
]);
static FILE: Object = Object::new(&[
    required("filename", Type::Str),
    optional("aio", Type::Enum(AIO)),
    optional("locking", Type::Enum(ON_OFF_AUTO)),
]);
const AIO: &[&str] = &["threads", "native", "io_uring"];
const ON_OFF_AUTO: &[&str] = &["auto", "on", "off"];
static CACHE: Object = Object::new(&[optional("direct", Type::Bool), optional("no-flush", Type::Bool)]);
static BLOCKDEV_DEL: Object = Object::new(&[required("node-name", Type::Str)]);
static BLOCKDEV_CREATE: Object =
    Object::new(&[required("job-id", Type::Str), required("options", Type::Object(&CREATE_OPTIONS))]);
static CREATE_OPTIONS: Object = Object::new(&[
    required("driver", Type::Enum(&["file"])),
    required("filename", Type::Str),
    required("size", Type::Int),
    optional("preallocation", Type::Enum(&["off", "falloc", "full"])),
]);

fn blockdev_add(call: &mut Call<'_>) -> Result<Value, Error> {
    let Some(name) = call.args.optional_string("node-name")? else {
        return Err(Error::generic("'node-name' must be specified for the root node"));
    };
    let driver = call.args.string("driver")?;
    let mut layers = vec![std::mem::replace(&mut call.args, Args::new(protocol::Map::new()))];
    if driver == "raw" {
        let file = layers[0].object("file")?;
        layers.push(file);
    }
    let read_only = flag(&mut layers, "read-only")?;
    let bottom = layers.len() - 1;
    let filename = layers[bottom].string("filename")?;
    let mut spec = NodeSpec::new(source(call.fdsets, &filename, read_only)?);
    spec.driver = match driver.as_str() {
        "raw" => "raw",
        "host_device" => "host_device",
        _ => "file",
    };
    spec.read_only = read_only;
    spec.auto_read_only = flag(&mut layers, "auto-read-only")?;
    spec.engine = match layers[bottom].optional_string("aio")?.as_deref() {
        Some("threads") => Some(EngineKind::Threads),
        Some("io_uring") => Some(EngineKind::Uring),
        // Linux AIO is not there: whatever is best.
        _ => None,
    };
    spec.lock = layers[bottom].optional_string("locking")?.as_deref() != Some("off");
    for layer in &mut layers {
        if let Some(discard) = layer.optional_string("discard")? {
            spec.discard = discard == "unmap";
        }
        if let Some(mut cache) = layer.optional_object("cache")? {
            spec.direct |= cache.optional_bool("direct")?.unwrap_or(false);
            if cache.optional_bool("no-flush")? == Some(true) {
                spec.cache = Cache::Unsafe;
            }
        }
    }
    let BlockLayer { jobs, disks } = call.vm.block();
    jobs.nodes.add(Some(name), true, spec, &devices(disks)).map(|_| nothing())
}

/// Set in any of the layers.
fn flag(layers: &mut [Args], name: &str) -> Result<bool, Error> {
    layers.iter_mut().try_fold(false, |set, layer| Ok(layer.optional_bool(name)?.unwrap_or(false) || set))
}

fn blockdev_del(call: &mut Call<'_>) -> Result<Value, Error> {
    let name = call.args.string("node-name")?;
    call.vm.block().jobs.nodes.delete(&name).map(|()| nothing())
}

fn blockdev_create(call: &mut Call<'_>) -> Result<Value, Error> {
    let id = call.args.string("job-id")?;
    let mut options = call.args.object("options")?;
    let filename = options.string("filename")?;
    let size = u64::try_from(options.int("size")?)
        .map_err(|_| Error::invalid_parameter_value("options.size", "a non-negative value"))?;
    let preallocation = options.optional_choice(
        "preallocation",
        &[("off", Preallocation::Off), ("falloc", Preallocation::Falloc), ("full", Preallocation::Full)],
    )?;
    let preallocation = preallocation.unwrap_or(Preallocation::Off);
    call.vm.block().jobs.create(id, filename.into(), size, preallocation).map(|()| nothing())
}

/// A path, or `/dev/fdset/N`.
pub(super) fn source(fdsets: &FdSets, filename: &str, read_only: bool) -> Result<NodeSource, Error> {
    let Some(set) = filename.strip_prefix("/dev/fdset/") else {
        return Ok(NodeSource::Path(filename.into()));
    };
    let access = if read_only { libc::O_RDONLY } else { libc::O_RDWR };
    let opened = match set.parse() {
        Ok(set) => fdsets.open(set, access),
        Err(_) => Err(std::io::Error::from_raw_os_error(libc::ENOENT)),
    };
    match opened {
        Ok(fd) => Ok(NodeSource::Descriptor { fd, name: filename.to_owned() }),
        Err(error) => Err(Error::generic(format!("Could not open '{filename}': {}", plain(&error)))),
    }
}
