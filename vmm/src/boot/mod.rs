//! Everything between an empty guest memory and the first instruction of the kernel.
//!
//! ```text
//!   BootFiles::open ── kernel kind, sizes, architecture checked, before KVM is touched
//!        │ load (again for every reset)
//!        ▼
//!   kernel ─ initrd ─ command line ─ memory map ─▶ linux::zero_page | pvh::start_info
//!        │                                                      │
//!        └──────────────▶ Entry ──▶ linux::registers | pvh::registers ──▶ boot vCPU
//! ```
//!
//! The files are the user's own, but may be truncated or not kernels at all: everything read from them is
//! checked before it is used as an address or a size.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader, PvhBootCapability};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use crate::config::{BootProtocol, VmSpec};
use crate::machine::layout;

pub mod acpi;
pub mod cpuid;
pub mod initrd;
pub mod linux;
pub mod pvh;
pub mod wake;

pub use initrd::Initrd;

/// Why a guest cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("Cannot open {what} {path:?}")]
    #[expect(missing_docs, reason = "the text says it")]
    Open { what: &'static str, path: PathBuf, source: io::Error },
    #[error("Cannot read {what} {path:?}")]
    #[expect(missing_docs, reason = "the text says it")]
    Read { what: &'static str, path: PathBuf, source: io::Error },
    #[error("Kernel {path:?} is {found}, not an x86_64 bzImage or ELF vmlinux")]
    #[expect(missing_docs, reason = "the text says it")]
    NotAKernel { path: PathBuf, found: &'static str },
    #[error("Kernel {path:?} is truncated: {have} bytes, its headers speak of {need}")]
    #[expect(missing_docs, reason = "the text says it")]
    Truncated { path: PathBuf, have: u64, need: u64 },
    #[error("Kernel {path:?} has no PVH entry point; boot it with the Linux protocol")]
    #[expect(missing_docs, reason = "the text says it")]
    NoPvhEntry { path: PathBuf },
    #[error("Cannot load kernel {path:?} into {memory_mib} MiB of memory: {reason}")]
    #[expect(missing_docs, reason = "the text says it")]
    Load { path: PathBuf, memory_mib: u64, reason: String },
    #[error(
        "Initrd of {size} bytes does not fit: between the kernel and the end of low memory are {room} bytes"
    )]
    #[expect(missing_docs, reason = "the text says it")]
    InitrdTooLarge { size: u64, room: u64 },
    #[error("Kernel command line of {len} bytes is too long: this kernel takes {max}")]
    #[expect(missing_docs, reason = "the text says it")]
    CmdlineTooLong { len: usize, max: usize },
    #[error("Kernel command line contains a NUL byte")]
    #[expect(missing_docs, reason = "the text says it")]
    CmdlineNul,
    #[error("Cannot write {what} to guest memory")]
    #[expect(missing_docs, reason = "the text says it")]
    Memory { what: &'static str, source: vm_memory::GuestMemoryError },
    #[error("Cannot set the {what} of a vCPU")]
    #[expect(missing_docs, reason = "the text says it")]
    Vcpu { what: &'static str, source: kvm_ioctls::Error },
    #[error("KVM does not take MSR {index:#x}")]
    #[expect(missing_docs, reason = "the text says it")]
    Msr { index: u32 },
    #[error("KVM takes no {entries} CPUID entries")]
    #[expect(missing_docs, reason = "the text says it")]
    Cpuid { entries: usize },
    #[error("ACPI tables of {len} bytes do not fit below 1 MiB")]
    #[expect(missing_docs, reason = "the text says it")]
    AcpiTooLarge { len: usize },
}

/// Where and how the boot vCPU enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit long mode, RSI = zero page.
    Linux {
        /// First instruction.
        rip: u64,
    },
    /// 32-bit protected mode, EBX = start info.
    Pvh {
        /// First instruction.
        rip: u64,
    },
}

/// What kind of kernel a file is.
enum KernelKind {
    BzImage(Box<setup_header>),
    Elf { pvh: bool, end: u64 },
}

/// Kernel, initrd and command line, opened and checked; kept open, so that a reset boots what the start booted.
pub struct BootFiles {
    path: PathBuf,
    kernel: File,
    kind: KernelKind,
    protocol: BootProtocol,
    initrd: Initrd,
    cmdline: Vec<u8>,
}

/// A bzImage's `xloadflags`: it has a 64-bit entry point at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// Linux' COMMAND_LINE_SIZE on x86, for images that do not say (with the NUL).
const ELF_CMDLINE_SIZE: usize = 2048;

impl BootFiles {
    /// Opens and checks what `spec` names.
    ///
    /// # Errors
    ///
    /// A missing or unreadable file, a kernel of another kind or architecture, a truncated one, or a command
    /// line it cannot take.
    pub fn open(spec: &VmSpec) -> Result<Self, BootError> {
        let path = spec.kernel.clone();
        let kernel = open_file("kernel", &path)?;
        let kind = probe(&path, &kernel)?;
        let wants_pvh = spec.boot == BootProtocol::Pvh;
        if wants_pvh && !matches!(kind, KernelKind::Elf { pvh: true, .. }) {
            return Err(BootError::NoPvhEntry { path });
        }
        let max = match &kind {
            KernelKind::BzImage(header) => (header.cmdline_size as usize).min(layout::CMDLINE_MAX - 1),
            KernelKind::Elf { .. } => ELF_CMDLINE_SIZE - 1,
        };
        let cmdline = spec.cmdline.clone().into_bytes();
        if cmdline.len() > max {
            return Err(BootError::CmdlineTooLong { len: cmdline.len(), max });
        }
        if cmdline.contains(&0) {
            return Err(BootError::CmdlineNul);
        }
        let initrd = Initrd::open(&spec.initrd)?;
        Ok(Self { path, kernel, kind, protocol: spec.boot, initrd, cmdline })
    }

    /// Loads everything into `memory` of `size` bytes and says where to begin. ACPI tables are at
    /// [`layout::ACPI`].
    ///
    /// # Errors
    ///
    /// The kernel or the initrd does not fit, or cannot be read any more.
    pub fn load(&self, memory: &GuestMemoryMmap, size: u64) -> Result<Entry, BootError> {
        let (entry, kernel_end, initrd_max, header) = self.load_kernel(memory, size)?;
        let initrd = self.initrd.load(memory, kernel_end, initrd_max.min(size.min(layout::GAP_START)))?;
        let mut cmdline = self.cmdline.clone();
        cmdline.push(0);
        write(memory, "the command line", &cmdline, layout::CMDLINE)?;
        match entry {
            Entry::Linux { .. } => linux::write_zero_page(memory, size, header, initrd, cmdline.len() - 1)?,
            Entry::Pvh { .. } => pvh::write_start_info(memory, size, initrd)?,
        }
        Ok(entry)
    }

    /// Returns the entry, the end of the kernel, the end of where its initrd may be, its setup header.
    fn load_kernel(
        &self,
        memory: &GuestMemoryMmap,
        size: u64,
    ) -> Result<(Entry, u64, u64, Option<setup_header>), BootError> {
        let fail =
            |reason: String| BootError::Load { path: self.path.clone(), memory_mib: size >> 20, reason };
        // linux-loader seeks and wants it mutable.
        let mut file = self.kernel.try_clone().map_err(|source| self.unreadable(source))?;
        match &self.kind {
            KernelKind::BzImage(header) => {
                let need = header.pref_address.saturating_add(u64::from(header.init_size));
                if need > size.min(layout::GAP_START) {
                    return Err(fail(format!("it needs {} MiB to unpack itself", need.div_ceil(1 << 20))));
                }
                let loaded = BzImage::load(memory, None, &mut file, Some(layout::HIGH_RAM))
                    .map_err(|e| fail(e.to_string()))?;
                let rip = loaded.kernel_load.raw_value() + 0x200;
                let initrd_max = u64::from(header.initrd_addr_max) + 1;
                Ok((Entry::Linux { rip }, need.max(loaded.kernel_end), initrd_max, loaded.setup_header))
            }
            KernelKind::Elf { end, .. } => {
                if *end > size.min(layout::GAP_START) {
                    return Err(fail(format!("it ends at {} MiB", end.div_ceil(1 << 20))));
                }
                let loaded = Elf::load(memory, None, &mut file, Some(layout::HIGH_RAM))
                    .map_err(|e| fail(e.to_string()))?;
                let entry = match (self.protocol, loaded.pvh_boot_cap) {
                    (BootProtocol::Auto | BootProtocol::Pvh, PvhBootCapability::PvhEntryPresent(at)) => {
                        Entry::Pvh { rip: at.raw_value() }
                    }
                    (BootProtocol::Pvh, _) => return Err(BootError::NoPvhEntry { path: self.path.clone() }),
                    _ => Entry::Linux { rip: loaded.kernel_load.raw_value() },
                };
                Ok((entry, *end, layout::GAP_START, None))
            }
        }
    }

    fn unreadable(&self, source: io::Error) -> BootError {
        BootError::Read { what: "kernel", path: self.path.clone(), source }
    }
}

/// Opens a file without waiting for anybody, as opening a pipe would.
fn open_file(what: &'static str, path: &Path) -> Result<File, BootError> {
    let options = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).to_owned();
    options.open(path).map_err(|source| BootError::Open { what, path: path.to_owned(), source })
}

/// Looks at the first bytes of a kernel image. Nothing is loaded yet.
fn probe(path: &Path, file: &File) -> Result<KernelKind, BootError> {
    let unreadable = |source| BootError::Read { what: "kernel", path: path.to_owned(), source };
    let metadata = file.metadata().map_err(unreadable)?;
    let not = |found| Err(BootError::NotAKernel { path: path.to_owned(), found });
    if !metadata.is_file() {
        return not(if metadata.is_dir() { "a directory" } else { "no regular file" });
    }
    let mut head = [0; 0x270];
    let have = read_head(file, &mut head).map_err(unreadable)?;
    let head = &head[..have];
    match head {
        [] => not("empty"),
        [0x7f, b'E', b'L', b'F', ..] => probe_elf(path, file, head, metadata.len()),
        [0x1f, 0x8b, ..] => not("a gzip file"),
        _ if head.get(56..60) == Some(b"ARM\x64") => not("an arm64 kernel"),
        _ if head.get(0x38..0x3c) == Some(b"RSC\x05") => not("a RISC-V kernel"),
        _ if head.get(0x202..0x206) == Some(b"HdrS") => probe_bzimage(path, head, metadata.len()),
        _ => not("something else"),
    }
}

fn read_head(file: &File, head: &mut [u8]) -> io::Result<usize> {
    let mut have = 0;
    while have < head.len() {
        match file.read_at(&mut head[have..], have as u64) {
            Ok(0) => break,
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(have)
}

fn probe_elf(path: &Path, file: &File, head: &[u8], len: u64) -> Result<KernelKind, BootError> {
    const PT_LOAD: u64 = 1;
    const PT_NOTE: u64 = 4;
    const EM_X86_64: u64 = 62;
    let not = |found| Err(BootError::NotAKernel { path: path.to_owned(), found });
    let truncated = |need| BootError::Truncated { path: path.to_owned(), have: len, need };
    let field = |bytes: &[u8], at: usize, size: usize| {
        bytes[at..at + size].iter().rev().fold(0_u64, |value, byte| (value << 8) | u64::from(*byte))
    };
    if head.len() < 64 {
        return Err(truncated(64));
    }
    if head[4] != 2 || head[5] != 1 || field(head, 18, 2) != EM_X86_64 {
        return not("an ELF file of another architecture");
    }
    if field(head, 16, 2) != 2 {
        return not("an ELF file, but not an executable one");
    }
    let (phoff, phentsize, phnum) = (field(head, 32, 8), field(head, 54, 2), field(head, 56, 2));
    if phentsize != 56 {
        return not("an ELF file with strange program headers");
    }
    let table_end = phoff.saturating_add(phnum * phentsize);
    if table_end > len {
        return Err(truncated(table_end));
    }
    let (mut pvh, mut kernel_end) = (false, 0);
    for index in 0..phnum {
        let mut header = [0; 56];
        file.read_exact_at(&mut header, phoff + index * phentsize).map_err(|source| BootError::Read {
            what: "kernel",
            path: path.to_owned(),
            source,
        })?;
        let end = field(&header, 8, 8).saturating_add(field(&header, 32, 8));
        match field(&header, 0, 4) {
            PT_LOAD | PT_NOTE if end > len => return Err(truncated(end)),
            PT_NOTE => pvh = true, // Whether it is the right note is seen when it is loaded.
            PT_LOAD => {
                // The loader copies what is in the file; what only takes room (.bss) counts as well.
                let (start, size) = (field(&header, 24, 8), field(&header, 40, 8).max(field(&header, 32, 8)));
                if size > 0 && start < layout::HIGH_RAM.raw_value() {
                    return not("an ELF file that loads below 1 MiB");
                }
                kernel_end = kernel_end.max(start.saturating_add(size));
            }
            _ => {}
        }
    }
    Ok(KernelKind::Elf { pvh, end: kernel_end })
}

fn probe_bzimage(path: &Path, head: &[u8], len: u64) -> Result<KernelKind, BootError> {
    use vm_memory::ByteValued;
    let size = std::mem::size_of::<setup_header>();
    let mut header = setup_header::default();
    let Some(bytes) = head.get(0x1f1..0x1f1 + size) else {
        return Err(BootError::Truncated { path: path.to_owned(), have: len, need: 0x1f1 + size as u64 });
    };
    header.as_mut_slice().copy_from_slice(bytes);
    if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
        let found = "a bzImage without a 64-bit entry point";
        return Err(BootError::NotAKernel { path: path.to_owned(), found });
    }
    let setup_sects = if header.setup_sects == 0 { 4 } else { header.setup_sects };
    let need = (u64::from(setup_sects) + 1) * 512 + u64::from(header.syssize) * 16;
    if len < need {
        return Err(BootError::Truncated { path: path.to_owned(), have: len, need });
    }
    Ok(KernelKind::BzImage(Box::new(header)))
}

/// Writes bytes that must fit, with a name for the error.
fn write(
    memory: &GuestMemoryMmap,
    what: &'static str,
    bytes: &[u8],
    at: GuestAddress,
) -> Result<(), BootError> {
    memory.write_slice(bytes, at).map_err(|source| BootError::Memory { what, source })
}
