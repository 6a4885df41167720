# shellcheck shell=bash
# Where the kernels lie, which of them fit these scripts, and what a machine needs for them. Sourced by `run`,
# `prepare` and `install`.
#
# A folder of the cache is named KIND-VERSION-KEY. KEY is a digest of all that goes into its files besides Debian's
# packages, so that a change here never meets an old kernel; a newer kernel in the archive is no reason to build.

rdma_here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
rdma_cache=${TIDEMILL_RDMA_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/tidemill/rdma}

# What the files in the cache are made by.
declare -A rdma_sources=(
  [uml]="kernel/build-uml kernel/uml.config"
  [qemu]="kernel/fetch-debian kernel/extract-vmlinux guest/initramfs"
)
# Programs a virtual machine needs, each with the package that has it: to run, and to prepare.
declare -A rdma_programs=(
  [run]="ip:iproute2 rdma:iproute2 busybox:busybox-static setpriv:util-linux python3:python3"
  [uml]=""
  [qemu]="qemu-system-x86_64:qemu-system-x86"
  [lint]="shellcheck:shellcheck"
  [prepare-uml]="gcc:gcc make:make flex:flex bison:bison bc:bc xz:xz-utils dpkg-deb:dpkg"
  [prepare-qemu]="modprobe:kmod cpio:cpio zstd:zstd xz:xz-utils dpkg-deb:dpkg"
  [prepare-lint]=""
)
# Libraries that programs in the machine load at run time.
rdma_libraries="libibverbs.so.1:libibverbs1 libibverbs/librxe-rdmav*.so:ibverbs-providers"

rdma_key() { # KIND
  local file
  for file in ${rdma_sources[$1]}; do cat "$rdma_here/$file"; done | sha256sum | cut -c 1-12
}

# The newest folder that is ready, or nothing.
rdma_cached() { # KIND
  local folder
  for folder in "$rdma_cache/$1"-*-"$(rdma_key "$1")"; do
    if [ -e "$folder/ready" ]; then printf '%s\n' "$folder"; fi
  done | sort --version-sort | tail --lines 1
}

# Packages that are missing for `run` on this kind of machine, and for `prepare` too if asked.
rdma_missing() { # KIND [prepare]
  local entry programs="${rdma_programs[run]} ${rdma_programs[$1]}"
  [ -z "${2:-}" ] || programs+=" ${rdma_programs[prepare-$1]}"
  {
    for entry in $programs; do
      PATH=$PATH:/usr/sbin:/sbin command -v "${entry%%:*}" >/dev/null || printf '%s\n' "${entry#*:}"
    done
    for entry in $rdma_libraries; do
      compgen -G "/usr/lib/x86_64-linux-gnu/${entry%%:*}" >/dev/null || printf '%s\n' "${entry#*:}"
    done
  } | sort --unique | paste --serial --delimiters ' '
}
