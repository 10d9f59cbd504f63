# shellcheck shell=bash
# Kernel modules of an unpacked Debian kernel package, found and put into load order without installing anything.
#
#   kernel_version TREE                     its only kernel's version
#   module_tree TREE VERSION                where its modules are (lib/modules in Debian 12, usr/lib/modules from 13 on)
#   prune_modules TREE                      removes the drivers of hardware that virtual machines never have: 300 of 400 MB
#   modules_in_order TREE VERSION NAME…     paths of the named modules and all they depend on, dependencies first, each once;
#                                           names that are built in or unknown to this kernel are left out
#   plain_module PATH [BUSYBOX]             the module's bytes, decompressed

kernel_version() {
    local tree
    for tree in "$1"/lib/modules/* "$1"/usr/lib/modules/*; do
        if [[ -d $tree ]]; then
            basename "$tree"
            return
        fi
    done
    return 1
}

module_tree() {
    local tree
    for tree in "$1/lib/modules/$2" "$1/usr/lib/modules/$2"; do
        if [[ -d $tree ]]; then
            printf '%s\n' "$tree"
            return
        fi
    done
    return 1
}

prune_modules() {
    local kernel
    kernel=$(module_tree "$1" "$(kernel_version "$1")")/kernel
    find "$kernel" -mindepth 1 -maxdepth 1 ! -name arch ! -name crypto ! -name drivers ! -name fs ! -name lib ! -name mm \
        ! -name net ! -name virt -exec rm -rf {} +
    find "$kernel/drivers" -mindepth 1 -maxdepth 1 ! -name acpi ! -name block ! -name char ! -name crypto ! -name dax \
        ! -name input ! -name md ! -name misc ! -name net ! -name nvdimm ! -name platform ! -name vhost ! -name virtio \
        -exec rm -rf {} +
    find "$kernel/drivers/net" -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +
    [[ ! -e $1/usr/lib/modules ]] || [[ -e $1/lib ]] || ln -s usr/lib "$1/lib" # where depmod looks
}

declare -gA module_path=() module_dependencies=() module_done=()

modules_in_order() {
    local tree path dependencies name
    tree=$(module_tree "$1" "$2")
    module_path=() module_dependencies=() module_done=()
    while IFS=: read -r path dependencies; do
        name=$(module_name "$path")
        module_path[$name]=$tree/$path
        module_dependencies[$name]=$dependencies
    done <"$tree/modules.dep"
    shift 2
    for name; do module_visit "$name"; done
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
        *.xz) "${2:-busybox}" xzcat "$1" ;;
        *.gz) "${2:-busybox}" zcat "$1" ;;
        *.zst) zstd -dcq "$1" ;;
        *) cat "$1" ;;
    esac
}
