//! Block nodes: images by name.
//!
//! ```text
//!                 blockdev-add                       a job begins
//!   (nothing) ─────────────────▶ idle: open, locked ───────────────▶ target: the disk's thread has it open
//!             ◀─────────────────  ▲                 ◀───────────────   │
//!                 blockdev-del    │                   the job ends     │ the disk switches to it
//!                                 │                                    ▼
//!                                 └───────────────────────────────── root: what a guest's disk works on
//!                                   another node becomes the root
//! ```
//!
//! A node that a client has added is there until the client deletes it; one that came with a disk, `drive-mirror` or
//! `drive-backup` goes when it is used no more. An image is open in one place at a time: a node that comes back from a disk's thread is
//! opened again, which may fail, and then is tried again when it is needed.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use block::{Cache, Disk, DiskOptions, EngineKind, EngineOptions, Filters, Format, OpenError, Source};
use protocol::Error;

use super::create::plain;
use super::lifecycle::JobKind;

/// The longest name (QEMU: 31 bytes).
const NAME_MAX: usize = 31;

/// Where a node's image is.
#[derive(Debug)]
pub enum NodeSource {
    /// A regular file or a block device.
    Path(PathBuf),
    /// Handed in, as `/dev/fdset/N`.
    Descriptor {
        /// The descriptor; a node keeps it, so that it can be used again.
        fd: OwnedFd,
        /// The name it was asked for by.
        name: String,
    },
}

impl NodeSource {
    /// What `query-block` calls it.
    pub fn name(&self) -> String {
        match self {
            Self::Path(path) => path.display().to_string(),
            Self::Descriptor { name, .. } => name.clone(),
        }
    }

    /// Bytes that a file takes on the host.
    fn allocated(&self) -> Option<u64> {
        use std::os::unix::fs::MetadataExt;
        let Self::Path(path) = self else { return None };
        let metadata = std::fs::metadata(path).ok()?;
        metadata.is_file().then(|| metadata.blocks() * 512)
    }
}

/// What a node is made of.
#[derive(Debug)]
pub struct NodeSpec {
    /// QEMU's name of the driver: `raw`, `file` or `host_device`; all of them mean a raw image.
    pub driver: &'static str,
    /// The image.
    pub source: NodeSource,
    /// It is never written.
    pub read_only: bool,
    /// It is opened for reading only when it cannot be written.
    pub auto_read_only: bool,
    /// The host's page cache is bypassed.
    pub direct: bool,
    /// When writes are durable.
    pub cache: Cache,
    /// Discarded ranges go back to the host.
    pub discard: bool,
    /// Whether the image is locked.
    pub lock: bool,
    /// The content is known to be raw: it is not looked at.
    pub stated: bool,
    /// Who makes the system calls.
    pub engine: Option<EngineKind>,
    /// Its limits and faults, whoever works on it; [`Nodes::add`] makes some where there are none.
    pub filters: Option<Filters>,
}

impl NodeSpec {
    /// A writable raw image of unknown content.
    pub fn new(source: NodeSource) -> Self {
        Self {
            driver: "raw",
            source,
            read_only: false,
            auto_read_only: false,
            direct: false,
            cache: Cache::Writeback,
            discard: true,
            lock: true,
            stated: true,
            engine: None,
            filters: None,
        }
    }

    fn open(&self) -> Result<Disk, Error> {
        match self.open_as(self.read_only) {
            Err(OpenError::Permission { .. } | OpenError::ReadOnly { .. })
                if self.auto_read_only && !self.read_only =>
            {
                self.open_as(true).map_err(|error| open_error(&error))
            }
            opened => opened.map_err(|error| open_error(&error)),
        }
    }

    fn open_as(&self, read_only: bool) -> Result<Disk, OpenError> {
        let source = match &self.source {
            NodeSource::Path(path) => Source::Path(path.clone()),
            NodeSource::Descriptor { fd, name } => match fd.try_clone() {
                Ok(fd) => Source::Descriptor { fd, name: name.clone() },
                Err(source) => return Err(OpenError::Io { image: name.clone(), source }),
            },
        };
        Disk::open(DiskOptions {
            format: self.stated.then_some(Format::Raw),
            read_only,
            direct: self.direct,
            cache: self.cache,
            discard: self.discard,
            lock: self.lock,
            ..DiskOptions::new(source)
        })
    }
}

/// QEMU's words where it has some.
fn open_error(error: &OpenError) -> Error {
    let could_not =
        |image: &str, why: &dyn std::fmt::Display| Error::generic(format!("Could not open '{image}': {why}"));
    match error {
        OpenError::Missing { image } => could_not(image, &"No such file or directory"),
        OpenError::Permission { image, .. } => could_not(image, &"Permission denied"),
        OpenError::ReadOnly { image } => could_not(image, &"Read-only file system"),
        OpenError::Io { image, source } => could_not(image, &plain(source)),
        other => Error::generic(other.to_string()),
    }
}

/// Who has a node's image open.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Use {
    /// The node itself.
    Idle,
    /// A job of this kind writes to it, of this disk.
    Target(usize, JobKind),
    /// This disk works on it.
    Root(usize),
}

/// A node.
pub struct Node {
    name: String,
    spec: NodeSpec,
    /// A client has added it, and it stays until a client deletes it.
    named: bool,
    used: Use,
    /// While it is idle; `None` then only if it could not be opened again.
    disk: Option<Disk>,
    /// In bytes, when it was opened last.
    size: u64,
    read_only: bool,
}

/// What clients get to see of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeInfo {
    /// Its name.
    pub name: String,
    /// QEMU's name of the driver.
    pub driver: &'static str,
    /// The image.
    pub filename: String,
    /// In bytes; that of a disk's node is the disk's to tell.
    pub size: u64,
    /// It is never written.
    pub read_only: bool,
    /// The host's page cache is bypassed.
    pub direct: bool,
    /// When writes are durable.
    pub cache: Cache,
    /// Bytes the image takes on the host, where that is known.
    pub actual_size: Option<u64>,
    /// The disk that works on it.
    pub disk: Option<usize>,
    /// Its limits and faults.
    pub filters: Option<Filters>,
}

impl Node {
    fn info(&self) -> NodeInfo {
        NodeInfo {
            name: self.name.clone(),
            driver: self.spec.driver,
            filename: self.spec.source.name(),
            size: self.size,
            read_only: self.read_only,
            direct: self.spec.direct,
            cache: self.spec.cache,
            actual_size: self.spec.source.allocated(),
            disk: match self.used {
                Use::Root(disk) => Some(disk),
                Use::Idle | Use::Target(..) => None,
            },
            filters: self.spec.filters.clone(),
        }
    }
}

/// All nodes of a VM.
pub struct Nodes {
    nodes: Vec<Node>,
    generated: u64,
}

impl Nodes {
    /// One for each disk, in order: its name, if it has one, and what it was opened from.
    pub fn new(disks: impl IntoIterator<Item = (Option<String>, NodeSpec)>) -> Self {
        let mut nodes = Self { nodes: Vec::new(), generated: 0 };
        for (index, (name, spec)) in disks.into_iter().enumerate() {
            let name = name.unwrap_or_else(|| nodes.generate());
            let read_only = spec.read_only;
            let used = Use::Root(index);
            nodes.nodes.push(Node { name, spec, named: false, used, disk: None, size: 0, read_only });
        }
        nodes
    }

    fn generate(&mut self) -> String {
        self.generated += 1;
        format!("#block{:03}", self.generated)
    }

    /// All of them, the newest first.
    pub fn list(&self) -> Vec<NodeInfo> {
        self.nodes.iter().rev().map(Node::info).collect()
    }

    /// What disk `disk` works on.
    pub fn root(&self, disk: usize) -> Option<NodeInfo> {
        self.nodes.iter().find(|node| node.used == Use::Root(disk)).map(Node::info)
    }

    /// What the mirror of disk `disk` writes to.
    pub fn target(&self, disk: usize) -> Option<NodeInfo> {
        self.nodes.iter().find(|node| matches!(node.used, Use::Target(of, _) if of == disk)).map(Node::info)
    }

    /// The node of that name.
    pub fn find(&self, name: &str) -> Option<NodeInfo> {
        self.nodes.iter().find(|node| node.name == name).map(Node::info)
    }

    /// Opens an image and gives it a name; without a name, it goes with its use.
    ///
    /// # Errors
    ///
    /// The name is not free or no name (`devices` are taken too); the image cannot be opened.
    pub fn add(
        &mut self,
        name: Option<String>,
        named: bool,
        mut spec: NodeSpec,
        devices: &[String],
    ) -> Result<String, Error> {
        if let Some(name) = &name {
            self.check_name(name, devices)?;
        }
        let disk = spec.open()?;
        if spec.filters.is_none() {
            let filters = Filters::new().map_err(|error| Error::generic(plain(&error)))?;
            spec.filters = Some(filters);
        }
        let name = name.unwrap_or_else(|| self.generate());
        let (size, read_only) = (disk.size(), disk.is_read_only());
        let node =
            Node { name: name.clone(), spec, named, used: Use::Idle, disk: Some(disk), size, read_only };
        self.nodes.push(node);
        Ok(name)
    }

    fn check_name(&self, name: &str, devices: &[String]) -> Result<(), Error> {
        let refuse = |text: String| Err(Error::generic(text));
        if !is_well_formed(name) {
            return refuse(format!("Invalid node-name: '{name}'"));
        }
        if devices.iter().any(|device| device == name) {
            return refuse(format!("node-name={name} is conflicting with a device id"));
        }
        if self.nodes.iter().any(|node| node.name == name) {
            return refuse(format!("Duplicate nodes with node-name='{name}'"));
        }
        if name.len() > NAME_MAX {
            return refuse("Node name too long".to_owned());
        }
        Ok(())
    }

    /// Closes an idle node.
    ///
    /// # Errors
    ///
    /// There is none of that name, or it is in use.
    pub fn delete(&mut self, name: &str) -> Result<(), Error> {
        let Some(index) = self.nodes.iter().position(|node| node.name == name) else {
            return Err(Error::generic(format!("Failed to find node with node-name='{name}'")));
        };
        if self.nodes[index].used != Use::Idle {
            return Err(Error::generic(format!("Node {name} is in use")));
        }
        self.nodes.remove(index);
        Ok(())
    }

    /// What a node lacks to be the target of a mirror, if anything; its size and its logical block size in bytes if
    /// nothing.
    ///
    /// # Errors
    ///
    /// It is in use, read-only or not to be opened.
    pub fn check_target(&mut self, name: &str) -> Result<(u64, u32), Error> {
        let node = self.get(name)?;
        let busy =
            |by: &str| Err(Error::generic(format!("Node '{name}' is busy: block device is in use by {by}")));
        match node.used {
            Use::Target(_, kind) => return busy(&format!("block job: {}", kind.name())),
            Use::Root(_) => return busy("a disk of the guest"),
            Use::Idle => {}
        }
        if node.disk.is_none() {
            node.reopen()?;
        }
        if node.read_only {
            return Err(Error::generic("Block node is read-only"));
        }
        let block_size = node.disk.as_ref().map_or(0, |disk| disk.geometry().logical_block_size);
        Ok((node.size, block_size))
    }

    /// Gives a node's image to a job of disk `disk`. A guest that was told that there is nothing to flush keeps
    /// what it was told: if the disk writes through, so will the target.
    ///
    /// # Errors
    ///
    /// As [`Self::check_target`].
    pub fn lend(&mut self, name: &str, disk: usize, kind: JobKind) -> Result<(Disk, EngineOptions), Error> {
        self.check_target(name)?;
        let writes_through = self.root(disk).is_some_and(|root| root.cache == Cache::Writethrough);
        let node = self.get(name)?;
        if writes_through && node.spec.cache != Cache::Writethrough {
            node.spec.cache = Cache::Writethrough;
            // Its lock is given back first.
            node.disk = None;
            node.reopen()?;
        }
        let image = node.disk.take().ok_or_else(|| Error::generic(format!("Node '{name}' is closed")))?;
        node.used = Use::Target(disk, kind);
        let NodeSpec { engine: kind, filters: node_filters, .. } = &node.spec;
        let node_filters = node_filters.clone();
        Ok((image, EngineOptions { kind: *kind, node_filters, ..EngineOptions::default() }))
    }

    /// The job of disk `disk` has ended, and the disk works on what it did.
    pub fn detached(&mut self, disk: usize) {
        self.give_back(|used| matches!(used, Use::Target(of, _) if *of == disk));
    }

    /// The disk works on the target of its mirror now.
    pub fn switched(&mut self, disk: usize) {
        self.give_back(|used| *used == Use::Root(disk));
        let is_target = |node: &&mut Node| matches!(node.used, Use::Target(of, _) if of == disk);
        if let Some(node) = self.nodes.iter_mut().find(is_target) {
            node.used = Use::Root(disk);
        }
    }

    /// Forgets a node that no client has added, if nothing uses it.
    pub fn drop_unnamed(&mut self, name: &str) {
        self.nodes.retain(|node| node.name != name || node.named || node.used != Use::Idle);
    }

    fn give_back(&mut self, is_it: impl Fn(&Use) -> bool) {
        let Some(index) = self.nodes.iter().position(|node| is_it(&node.used)) else { return };
        if !self.nodes[index].named {
            self.nodes.remove(index);
            return;
        }
        let node = &mut self.nodes[index];
        node.used = Use::Idle;
        if let Err(error) = node.reopen() {
            tracing::warn!(node = node.name, "{}: it is tried again when the node is used", error.desc);
        }
    }

    fn get(&mut self, name: &str) -> Result<&mut Node, Error> {
        let missing = || Error::generic(format!("Cannot find device='{name}' nor node-name='{name}'"));
        self.nodes.iter_mut().find(|node| node.name == name).ok_or_else(missing)
    }
}

impl Node {
    fn reopen(&mut self) -> Result<(), Error> {
        let disk = self.spec.open()?;
        (self.size, self.read_only) = (disk.size(), disk.is_read_only());
        self.disk = Some(disk);
        Ok(())
    }
}

/// QEMU's rule for names that users choose: a letter, then letters, digits, `-`, `.` and `_`.
pub(super) fn is_well_formed(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_alphabetic())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_of_a_disk_that_writes_through_does_so_too() {
        let directory = tempfile::tempdir().unwrap();
        let spec = |name: &str| NodeSpec::new(NodeSource::Path(directory.path().join(name)));
        for name in ["t", "u"] {
            std::fs::write(directory.path().join(name), [0; 512]).unwrap();
        }
        let through = NodeSpec { cache: Cache::Writethrough, ..spec("a") };
        let mut nodes = Nodes::new([(None, through), (Some("b".into()), spec("b"))]);
        for (disk, name, cache) in [(0, "t", Cache::Writethrough), (1, "u", Cache::Writeback)] {
            nodes.add(Some(name.into()), true, spec(name), &[]).unwrap();
            assert_eq!(nodes.lend(name, disk, JobKind::Mirror).unwrap().0.cache(), cache);
            assert!(nodes.lend(name, disk, JobKind::Mirror).is_err());
        }
    }

    #[test]
    fn an_image_that_cannot_be_opened_again_is_tried_again_when_it_is_needed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("t");
        let spec = || NodeSpec::new(NodeSource::Path(path.clone()));
        let mut nodes = Nodes::new([(None, NodeSpec::new(NodeSource::Path("/a".into())))]);
        std::fs::write(&path, [0; 512]).unwrap();
        nodes.add(Some("t".into()), true, spec(), &[]).unwrap();
        drop(nodes.lend("t", 0, JobKind::Mirror).unwrap());
        std::fs::remove_file(&path).unwrap();
        nodes.detached(0);
        let text = format!("Could not open '{}': No such file or directory", path.display());
        assert_eq!(nodes.check_target("t").unwrap_err().desc, text);
        std::fs::write(&path, [0; 1024]).unwrap();
        assert_eq!(nodes.check_target("t").unwrap(), (1024, 512));
        nodes.delete("t").unwrap();
    }
}
