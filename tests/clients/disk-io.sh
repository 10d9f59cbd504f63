# shellcheck shell=bash
# disk-io for test guests. Sourced, behind scripts/newc.sh, by scripts that have set $root.

# pack_disk_io DIR: compiles it and packs it as DIR/disk-io.cpio, an initramfs to load behind the guest image's; unless
# it is there, and new enough.
pack_disk_io() {
    local out=$1 source
    for source in "${root:?}"/tests/clients/disk-io.{rs,sh}; do
        [[ $out/disk-io.cpio -nt $source ]] || break
        source=
    done
    [[ -n $source ]] || return 0
    rustc --edition 2024 -O -C target-feature=+crt-static -C panic=abort -C strip=symbols \
        -o "$out/disk-io" "$root/tests/clients/disk-io.rs"
    {
        newc_dir usr 755
        newc_dir usr/bin 755
        newc_file usr/bin/disk-io 755 "$out/disk-io"
        newc_end
    } >"$out/disk-io.cpio.new"
    mv "$out/disk-io.cpio.new" "$out/disk-io.cpio"
}
