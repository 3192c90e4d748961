#!/bin/sh
# A real Apptainer on this one machine, and a Debian folder to build images on, where no container registry is at hand:
#   sh env/local_apptainer.sh up      make what is missing in /tmp/ftlib-apptainer or $FTLIB_APPTAINER_DIR; about a minute
#   sh env/local_apptainer.sh down    remove it
# `up` prints the folder. In it: bin/apptainer, a command like any other, and base/, Debian with Python and a compiler.
# Debian's package needs a newer C library than most machines have: it gets a root of its own, entered on each call with
# this machine's folders bound, as an ordinary user of a user namespace, just as on a cluster.
# Needs root, debootstrap, and Debian's mirror as apt on this machine knows it. Exit 69: a package missing; 77: not root.
set -eu
dir=${FTLIB_APPTAINER_DIR:-/tmp/ftlib-apptainer}
die() { echo "apptainer: $2" >&2; exit "$1"; }
[ "$(id -u)" = 0 ] || die 77 "this must run as root: debootstrap makes device files (try sudo)"
case $dir in /*) ;; *) die 64 "FTLIB_APPTAINER_DIR=$dir: want an absolute path" ;; esac

if [ "${1:-}" = down ]; then
    [ ! -e "$dir" ] || [ -e "$dir/.ftlib-apptainer" ] || die 64 "$dir was not made by this script"
    rm -rf --one-file-system "$dir"
    exit
fi
[ "${1:-}" = up ] || die 64 "say up or down"
mkdir -p "$dir/bin" "$dir/log"
touch "$dir/.ftlib-apptainer"
if ! command -v debootstrap >/dev/null; then
    { apt-get -qq update; apt-get -qq install -y --no-install-recommends debootstrap; } >"$dir/log/apt" 2>&1 || die 69 "debootstrap cannot be installed"
fi
mirror=$(apt-get indextargets --format '$(SITE)' 2>/dev/null | grep -v security | grep '/debian/*$' | head -n 1) || true

debian() { # debian NAME SUITE PACKAGES: a root folder, there whole or not at all
    [ ! -e "$dir/$1" ] || return 0
    echo "apptainer: making $dir/$1 (Debian $2)" >&2
    rm -rf "$dir/.$1"
    debootstrap --variant=minbase --include="$3" "$2" "$dir/.$1" ${mirror:+"$mirror"} >"$dir/log/$1" 2>&1 ||
        die 69 "debootstrap failed: $(tail -n 1 "$dir/log/$1") (all of it: $dir/log/$1)"
    umount "$dir/.$1/proc" "$dir/.$1/sys" 2>/dev/null || true
    rm -rf "$dir/.$1/var/cache/apt/archives" "$dir/.$1/var/lib/apt/lists"
}
debian base bookworm python3,python3-venv,python3-dev,g++,ca-certificates
# Only one user is mapped in an ordinary user's build, and a base keeps its own /dev out of it.
[ -e "$dir/base" ] || { chown -R 0:0 "$dir/.base"; rm -rf "$dir/.base/dev"; mkdir "$dir/.base/dev"; mv "$dir/.base" "$dir/base"; }
debian root sid apptainer,squashfs-tools,uidmap,e2fsprogs,fuse2fs,squashfuse,ca-certificates
[ -e "$dir/root" ] || { echo user:x:1000:1000::/root:/bin/sh >>"$dir/.root/etc/passwd"; echo user:x:1000: >>"$dir/.root/etc/group"; mv "$dir/.root" "$dir/root"; }

cat >"$dir/bin/apptainer" <<END
#!/bin/sh
exec unshare --mount --propagation private sh -ec '
root=\$1 here=\$2; shift 2
mount --bind "\$root" "\$root"; cd "\$root"
for d in /*; do
    case \$d in /bin|/boot|/etc|/lib*|/sbin|/usr|/var|/lost+found) continue ;; esac
    [ -d "\$d" ] && [ ! -L "\$d" ] || continue
    mkdir -p ".\$d"; mount --rbind "\$d" ".\$d"
done
for f in resolv.conf hosts; do touch "./etc/\$f"; mount --bind "/etc/\$f" "./etc/\$f"; done
mkdir -p .old; pivot_root . .old; umount -l /.old
cd "\$here" 2>/dev/null || cd /
exec unshare --user --map-user=1000 --map-group=1000 -- /usr/bin/apptainer "\$@"
' sh "$dir/root" "\$PWD" "\$@"
END
chmod +x "$dir/bin/apptainer"
"$dir/bin/apptainer" --version >&2
echo "$dir"
