# shellcheck shell=bash
# Writes initramfs archives (cpio "newc", Documentation/driver-api/early-userspace/buffer-format.rst of the kernel)
# with nothing but bash and cat: no root for device nodes, no cpio package, and the same bytes for the same contents
# (owner 0:0, time stamp 0, inode numbers in order of appearance).
#
#   source scripts/newc.sh
#   { newc_dir dev 755; newc_node dev/console 600 c 5 1; newc_file init 755 my-init; newc_link bin/sh busybox; newc_end; } >initrd
#
# Parent directories first, names without a leading slash. Concatenated archives are one initramfs.

newc_inode=0

# newc_entry NAME MODE(octal, with type) SIZE MAJOR MINOR: header and name, padded.
newc_entry() {
    newc_inode=$((newc_inode + 1))
    # magic ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    printf '070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\0' \
        "$newc_inode" "$((8#$2))" 0 0 1 0 "$3" 0 0 "$4" "$5" "$((${#1} + 1))" 0 "$1"
    newc_pad $((110 + ${#1} + 1))
}

# newc_pad LENGTH: zeros up to the next multiple of four.
newc_pad() {
    case $(($1 % 4)) in
        1) printf '\0\0\0' ;;
        2) printf '\0\0' ;;
        3) printf '\0' ;;
    esac
}

# newc_dir NAME MODE
newc_dir() { newc_entry "$1" $((40000 + 10#$2)) 0 0 0; }

# newc_node NAME MODE c|b MAJOR MINOR
newc_node() {
    local type=20000
    if [[ $3 == b ]]; then type=60000; fi
    newc_entry "$1" $((type + 10#$2)) 0 "$4" "$5"
}

# newc_link NAME TARGET
newc_link() {
    local LC_ALL=C
    newc_entry "$1" 120777 ${#2} 0 0
    printf '%s' "$2"
    newc_pad ${#2}
}

# newc_file NAME MODE SOURCE
newc_file() {
    local size
    size=$(stat -Lc %s "$3")
    newc_entry "$1" $((100000 + 10#$2)) "$size" 0 0
    cat "$3"
    newc_pad "$size"
}

# newc_end: the trailer.
newc_end() { newc_entry TRAILER!!! 0 0 0 0; }
