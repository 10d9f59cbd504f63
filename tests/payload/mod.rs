//! A guest of a few bytes: a PVH ELF that prints a line on COM1 and then does one thing.
//!
//! It needs no kernel package, boots in microseconds on any KVM (a software one too), and so tests and measures the
//! VMM alone.

/// What the payload does after its line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// Halts with interrupts off, for ever.
    Halt,
    /// Asks the keyboard controller for a reset.
    Reset,
    /// Writes this value to this 16-bit port (ACPI sleep, pvpanic).
    Out {
        /// Port.
        port: u16,
        /// Value, written as 16 bits.
        value: u16,
    },
    /// Writes this byte to this port and then halts (pvpanic).
    OutByte {
        /// Port.
        port: u16,
        /// Value.
        value: u8,
    },
    /// Takes an exception without a handler for it, nor for that one.
    TripleFault,
    /// Goes on at this address.
    Jump(u32),
    /// Counts for ever in a loop that never leaves the guest.
    Spin,
}

const LOAD: u32 = 0x10_0000;
const CODE_OFFSET: usize = 0x1000;

/// The ELF image of a payload that prints `line` and then does `then`.
pub fn pvh_elf(line: &str, then: Then) -> Vec<u8> {
    let code = code(line, then);
    let note = note();
    let note_offset = 64 + 2 * 56;
    let mut elf = Vec::new();
    elf.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend(2_u16.to_le_bytes()); // ET_EXEC
    elf.extend(62_u16.to_le_bytes()); // EM_X86_64
    elf.extend(1_u32.to_le_bytes());
    elf.extend(u64::from(LOAD).to_le_bytes()); // entry
    elf.extend(64_u64.to_le_bytes()); // program headers
    elf.extend(0_u64.to_le_bytes()); // no section headers
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    program_header(&mut elf, 1, 5, CODE_OFFSET, LOAD, code.len());
    program_header(&mut elf, 4, 4, note_offset, 0, note.len());
    elf.extend(note);
    elf.resize(CODE_OFFSET, 0);
    elf.extend(code);
    elf
}

fn program_header(elf: &mut Vec<u8>, kind: u32, flags: u32, offset: usize, address: u32, len: usize) {
    elf.extend(kind.to_le_bytes());
    elf.extend(flags.to_le_bytes());
    elf.extend((offset as u64).to_le_bytes());
    elf.extend(u64::from(address).to_le_bytes());
    elf.extend(u64::from(address).to_le_bytes());
    elf.extend((len as u64).to_le_bytes());
    elf.extend((len as u64).to_le_bytes());
    elf.extend(4_u64.to_le_bytes());
}

/// XEN_ELFNOTE_PHYS32_ENTRY.
fn note() -> Vec<u8> {
    let mut note = Vec::new();
    note.extend(4_u32.to_le_bytes());
    note.extend(4_u32.to_le_bytes());
    note.extend(18_u32.to_le_bytes());
    note.extend(b"Xen\0");
    note.extend(LOAD.to_le_bytes());
    note
}

fn code(line: &str, then: Then) -> Vec<u8> {
    let halt = [0xfa, 0xf4, 0xeb, 0xfd]; // cli; hlt; jmp back
    let text_at = |after: usize| LOAD + 5 + 5 + 8 + u32::try_from(after + halt.len()).expect("a few bytes");
    let after: Vec<u8> = match then {
        Then::Halt => vec![],
        Then::Reset => vec![0xb0, 0xfe, 0xe6, 0x64], // mov al, 0xfe; out 0x64, al
        Then::Out { port, value } => {
            let ([pl, ph], [vl, vh]) = (port.to_le_bytes(), value.to_le_bytes());
            // mov edx, port; mov eax, value; out dx, ax
            vec![0xba, pl, ph, 0, 0, 0xb8, vl, vh, 0, 0, 0x66, 0xef]
        }
        Then::OutByte { port, value } => {
            let [pl, ph] = port.to_le_bytes();
            vec![0xba, pl, ph, 0, 0, 0xb0, value, 0xee] // mov edx, port; mov al, value; out dx, al
        }
        Then::TripleFault => {
            // lidt [six zero bytes behind the text]; int3
            let zeros = text_at(8) + u32::try_from(line.len()).expect("a line");
            let [a, b, c, d] = zeros.to_le_bytes();
            vec![0x0f, 0x01, 0x1d, a, b, c, d, 0xcc]
        }
        Then::Jump(to) => {
            let [a, b, c, d] = to.to_le_bytes();
            vec![0xb8, a, b, c, d, 0xff, 0xe0] // mov eax, to; jmp eax
        }
        Then::Spin => vec![0x40, 0xeb, 0xfd], // inc eax; jmp back
    };
    let mut code = vec![0xba, 0xf8, 0x03, 0, 0, 0xbe]; // mov edx, COM1; mov esi, text
    code.extend(text_at(after.len()).to_le_bytes());
    // next: lodsb; test al, al; jz over; out dx, al; jmp next
    code.extend([0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8]);
    code.extend(after);
    code.extend(halt);
    code.extend(line.as_bytes());
    code.extend([0; 8]);
    code
}
