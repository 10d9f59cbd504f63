# shellcheck shell=bash
# Debian packages, in the two ways the scripts need them:
#
#   need COMMAND PACKAGE REASON     notes that PACKAGE is missing if COMMAND is not there
#   need_file FILE PACKAGE REASON   the same for a file
#   need_linker                     notes what is missing for linking Rust programs, static ones included
#   need_rust                       ends with advice unless there is a Rust toolchain that is new enough
#   install_needed                  installs what was noted, if root or passwordless sudo allows; else says how to
#
#   unpack_package PACKAGE DIR      fetches PACKAGE (or the package it stands for: linux-image-amd64) with apt-get, without
#                                   installing it and without root, and unpacks it into DIR; its name and version then
#                                   stand in DIR/PACKAGE.package
#   unpack_packages DIR PACKAGE…    the same for several at once
#
# All messages go to stderr. Works as root and as any user; nothing happens where nothing is missing.

needed_packages=()
needed_reasons=()

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
    say "$@"
    exit 125
}

need() { command -v -- "$1" >/dev/null || note_package "$2" "$3"; }
need_file() { [[ -e $1 ]] || note_package "$2" "$3"; }

need_linker() {
    need cc gcc "links Rust programs"
    # cc prints the whole path of a library that it has, else the bare name.
    [[ $(cc -print-file-name=libc.a 2>/dev/null) == /* ]] || note_package libc6-dev "is what Rust programs link to"
}

# Debian 12 has a Rust of its own, too old for us: no package to note.
need_rust() {
    local wanted have
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "${BASH_SOURCE[0]}")/../Cargo.toml")
    have=$(rustc --version 2>/dev/null | cut -d ' ' -f 2) || true
    [[ -n $have ]] && command -v cargo >/dev/null && sort -CV <<<"$wanted"$'\n'"$have" && return
    die "Rust $wanted or newer is needed (here: ${have:-none}): install it from https://rustup.rs"
}

note_package() {
    local known
    for known in "${needed_packages[@]}"; do
        [[ $known != "$1" ]] || return 0
    done
    needed_packages+=("$1")
    needed_reasons+=("$2")
}

# as_root COMMAND…: as root, by sudo where it asks no password, or not at all.
as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo -n -- "$@"
    else
        return 1
    fi
}

install_needed() {
    ((${#needed_packages[@]})) || return 0
    local index
    for index in "${!needed_packages[@]}"; do
        say "missing: ${needed_packages[index]} — ${needed_reasons[index]}"
    done
    if ! command -v apt-get >/dev/null; then
        die "this machine has no apt-get: please install the counterparts of these Debian packages, then run me again"
    fi
    if ! as_root true; then
        die "please run:  sudo apt-get update && sudo apt-get install --no-install-recommends ${needed_packages[*]}"
    fi
    say "installing ${needed_packages[*]} with apt-get"
    # Lists may be stale or absent (fresh containers have none): a failed attempt updates them and tries once more.
    if ! apt_install "${needed_packages[@]}" 2>/dev/null; then
        as_root apt-get -qq update >&2
        apt_install "${needed_packages[@]}" || die "apt-get could not install ${needed_packages[*]}"
    fi
    needed_packages=()
    needed_reasons=()
}

apt_install() {
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq -y -o Dpkg::Use-Pty=0 install --no-install-recommends "$@" >&2
}

# real_package PACKAGE: the package that a metapackage of the kernel stands for, else itself.
real_package() {
    local real
    real=$(apt-cache depends -- "$1" | sed -n 's/^ *|*Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
    printf '%s\n' "${real:-$1}"
}

unpack_package() { unpack_packages "$2" "$1"; }

unpack_packages() {
    local directory=$1 package scratch deb
    local -A asked=()
    shift
    if ! command -v apt-get dpkg-deb >/dev/null; then
        die "apt-get and dpkg-deb are needed to fetch the Debian package $1, and this machine has none"
    fi
    if [[ -z $(apt-cache --quiet=2 show -- "$1" 2>/dev/null) ]]; then
        say "package lists do not know $1 yet: updating them"
        as_root apt-get -qq update >&2 ||
            die "the package lists do not know $1; please run:  sudo apt-get update"
    fi
    for package in "$@"; do asked[$(real_package "$package")]=$package; done
    say "fetching ${!asked[*]} (not installed into the system, unpacked into $directory)"
    mkdir -p "$directory"
    scratch=$(mktemp -d "$directory/fetch.XXXXXX")
    # apt-get drops to user _apt, who cannot write here, unless it is told to stay.
    (cd "$scratch" && apt-get -qq -o APT::Sandbox::User="$(id -un)" download -- "${!asked[@]}" >&2) ||
        { rm -rf "$scratch"; die "cannot fetch ${!asked[*]}: see the messages above; 'apt-get update' may help"; }
    for deb in "$scratch"/*.deb; do
        dpkg-deb -x "$deb" "$directory" || { rm -rf "$scratch"; die "cannot unpack $deb"; }
        package=${asked[$(dpkg-deb -f "$deb" Package)]}
        dpkg-deb -f "$deb" Package Version | sed 's/^[A-Z][a-z]*: //' | paste -sd ' ' >"$directory/$package.package"
    done
    rm -rf "$scratch"
}
