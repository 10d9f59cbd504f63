# shellcheck shell=bash
# Debian's fio for test guests. Sourced, behind scripts/packages.sh, with /usr/sbin in PATH.

# Notes what is missing for it.
need_fio() {
    need fio fio "checks and measures disks, in the guest"
    need mkfs.ext4 e2fsprogs "formats disks for the guest"
}

# libraries PROGRAM: the shared libraries it needs, loader included.
libraries() { ldd "$1" | grep -o '/[^ ]*'; }

# pack_fio DIR: makes DIR/fio.ext4, a disk with fio and what it needs, which is too large for an initramfs; unless it is
# there, and new enough. In the guest: ld.so --library-path lib fio
pack_fio() {
    local out=$1 program library loader
    program=$(command -v fio)
    [[ $out/fio.ext4 -nt $program && $out/fio.ext4 -nt ${BASH_SOURCE[0]} ]] && return
    rm -rf "$out/fio"
    mkdir -p "$out/fio/lib"
    cp "$program" "$out/fio/fio"
    while read -r library; do cp "$library" "$out/fio/lib/"; done < <(libraries "$program")
    loader=$(find "$out/fio/lib" -name 'ld-linux*')
    mv "$loader" "$out/fio/ld.so"
    rm -f "$out/fio.ext4.new"
    truncate -s 256M "$out/fio.ext4.new"
    mkfs.ext4 -q -F -m 0 -d "$out/fio" "$out/fio.ext4.new"
    rm -rf "$out/fio"
    mv "$out/fio.ext4.new" "$out/fio.ext4"
}
