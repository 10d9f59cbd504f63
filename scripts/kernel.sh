# shellcheck shell=bash
# What is in an unpacked Debian kernel package: the kernel, and its modules in load order. Nothing is installed.
#
#   extract_vmlinux VMLINUZ VMLINUX         the ELF image inside a bzImage: its PVH entry point spares an emulated processor
#                                           the decompression
#   module_tree TREE                        where its only kernel's modules are: TREE/lib/modules/VERSION, or below usr/
#   prune_modules TREE                      removes the drivers of hardware that virtual machines never have: 300 of 400 MB
#   index_modules TREE                      writes modules.dep and the other indices
#   modules_in_order MODULES NAME…          paths, below the directory MODULES with its modules.dep, of the named modules and
#                                           all they depend on, dependencies first, each once; names that are built in or
#                                           unknown to this kernel are left out
#   kernel_knows MODULES NAME               whether NAME is one of its modules or built in
#   plain_module PATH                       the module's bytes, decompressed

module_tree() {
    local tree
    for tree in "$1"/lib/modules/* "$1"/usr/lib/modules/*; do
        if [[ -d $tree/kernel ]]; then
            printf '%s\n' "$tree"
            return
        fi
    done
    return 1
}

index_modules() {
    [[ -e $1/lib ]] || ln -s usr/lib "$1/lib" # where depmod looks; packages from Debian 13 on have usr/ alone
    depmod -b "$1" "$(basename "$(module_tree "$1")")"
}

prune_modules() {
    local kernel
    kernel=$(module_tree "$1")/kernel
    find "$kernel" -mindepth 1 -maxdepth 1 ! -name arch ! -name crypto ! -name drivers ! -name fs ! -name lib ! -name mm \
        ! -name net ! -name virt -exec rm -rf {} +
    find "$kernel/drivers" -mindepth 1 -maxdepth 1 ! -name acpi ! -name block ! -name char ! -name crypto ! -name dax \
        ! -name input ! -name md ! -name misc ! -name net ! -name nvdimm ! -name platform ! -name vhost ! -name virtio \
        -exec rm -rf {} +
    find "$kernel/drivers/net" -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +
}

declare -gA module_path=() module_dependencies=() module_done=()

modules_in_order() {
    local tree=$1 path dependencies name
    module_path=() module_dependencies=() module_done=()
    while IFS=: read -r path dependencies; do
        name=$(module_name "$path")
        module_path[$name]=$path
        module_dependencies[$name]=$dependencies
    done <"$tree/modules.dep"
    shift
    for name; do module_visit "$name"; done
}

kernel_knows() {
    local name=${2//[-_]/[-_]} # the files' names have either
    grep -qE "/$name\.ko" "$1/modules.dep" "$1/modules.builtin"
}

# module_visit NAME: prints what NAME depends on, then NAME.
module_visit() {
    local name=${1//-/_} dependency
    [[ -n ${module_path[$name]:-} && -z ${module_done[$name]:-} ]] || return 0
    module_done[$name]=1
    for dependency in ${module_dependencies[$name]}; do module_visit "$(module_name "$dependency")"; done
    printf '%s\n' "${module_path[$name]}"
}

# module_name PATH: as the kernel spells it.
module_name() {
    local name=${1##*/}
    name=${name%%.ko*}
    printf '%s\n' "${name//-/_}"
}

plain_module() {
    case $1 in
        *.xz) xz -dc "$1" ;;
        *.gz) gzip -dc "$1" ;;
        *.zst) zstd -dcq "$1" ;;
        *) cat "$1" ;;
    esac
}

# The payload's place and length stand in the setup header (Documentation/arch/x86/boot.rst: setup_sects at 0x1f1,
# payload_offset at 0x248, payload_length at 0x24c). After all but gzip data follow four bytes: the unpacked size.
extract_vmlinux() {
    local sectors offset length magic
    [[ $(bytes "$1" $((0x202)) 4 c) == HdrS ]] || return 1
    sectors=$(bytes "$1" $((0x1f1)) 1 u1)
    offset=$(($(bytes "$1" $((0x248)) 4 u4) + (${sectors/#0/4} + 1) * 512))
    length=$(bytes "$1" $((0x24c)) 4 u4)
    magic=$(bytes "$1" "$offset" 4 x1)
    local unpack
    case $magic in
        1f8b*) unpack=(gzip -dcq) length=$((length + 4)) ;;
        fd377a58) unpack=(xz -dcq) ;;
        28b52ffd) unpack=(zstd -dcq) ;;
        02214c18) unpack=(lz4 -dcq) ;;
        425a68*) unpack=(bzip2 -dcq) ;;
        5d0000*) unpack=(xz --format=lzma -dcq) ;;
        *) return 1 ;;
    esac
    dd if="$1" bs=1M iflag=skip_bytes,count_bytes skip="$offset" count=$((length - 4)) status=none | "${unpack[@]}" >"$2"
    [[ $(bytes "$2" 0 4 x1) == 7f454c46 ]]
}

# bytes FILE OFFSET COUNT FORMAT(of od): without blanks.
bytes() { od -A n -v -j "$2" -N "$3" -t "$4" "$1" | tr -d ' \n'; }
