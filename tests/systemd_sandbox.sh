#!/usr/bin/env bash
# systemd_sandbox.sh - run a REAL systemd as PID 1 of throw-away namespaces, on a host whose own
# PID 1 is not systemd. Needs: root, bash, util-linux (unshare/nsenter/setpriv/pivot_root), overlayfs,
# cgroup2 and an installed systemd. No network, no debootstrap, no packages, nothing left on the host.
#
#   systemd_sandbox.sh check                    exit 0: can run here; 77: cannot (says why; use as "skip")
#   systemd_sandbox.sh up DIR [OPTIONS]         boot; DIR = folder of unit files, seen read-only and live
#                                               at /usr/local/lib/systemd/system. A running one is replaced.
#       --ro SRC[:DST]   bind SRC read-only     --rw SRC[:DST]  bind SRC read-write   (DST defaults to SRC)
#       --venv SRC[:DST] python venv, read-only, relocated so that DynamicUser=/ProtectHome= units can run
#                        it (DST defaults to /opt/venv; its base interpreter goes to /opt/python-base)
#       --enable UNIT    start UNIT at boot     --net private|host   (default private: own lo, no outside)
#       --lower DIR      root tree under the overlay (default /; any tree that has systemd in it)
#       --cgroup v2|v1   v1: also memory/pids/cpu limits where the host keeps those controllers on cgroup v1
#       --timeout S      boot limit, 1..45 s (default 40)
#   systemd_sandbox.sh exec CMD...              run CMD inside as root (cwd /, clean env); its exit status
#   systemd_sandbox.sh down                     power off (10 s), else kill; remove cgroups and state
#   systemd_sandbox.sh pid | status             host pid of the sandbox's PID 1 | its state
# Several at once: SDSB_NAME=foo systemd_sandbox.sh ...      State: /tmp/.sdsb-$SDSB_NAME (mode 0700)
# Other knobs: SDSB_SIZE=2g (tmpfs for all writes), SDSB_KEEP="unit ..." (do not mask), SDSB_DOWN_S=10.
set -euo pipefail

NAME=${SDSB_NAME:-default}
[[ $NAME =~ ^[A-Za-z0-9_-]{1,32}$ ]] || { echo "sdsb: bad SDSB_NAME" >&2; exit 2; }
STATE=/tmp/.sdsb-$NAME
SELF=$(readlink -f "${BASH_SOURCE[0]}")
SYSTEMD=/usr/lib/systemd/systemd
# Kept out of the boot: they touch the shared kernel (sysctl, audit, debugfs, modules) or only cost time.
MASK="systemd-sysctl.service systemd-modules-load.service systemd-binfmt.service systemd-journald-audit.socket
 proc-sys-fs-binfmt_misc.automount sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount
 sys-fs-fuse-connections.mount dev-hugepages.mount kmod-static-nodes.service modprobe@.service
 systemd-remount-fs.service systemd-udevd.service systemd-logind.service getty.target console-getty.service
 systemd-timesyncd.service systemd-networkd.service systemd-resolved.service systemd-firstboot.service"
# Each of these would reach past the namespaces into the one shared kernel.
DROPCAPS=-sys_time,-sys_module,-sys_rawio,-syslog,-audit_control,-audit_read,-mac_admin,-mac_override,-wake_alarm

say() { echo "sdsb: $*" >&2; }
die() { say "$*"; exit 1; }
now() { date +%s%N; }
mount() { command mount -n "$@"; }       # -n: libmount would leave /run/mount behind on the host
umount() { command umount -n "$@"; }
starttime() { local s; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1; s=${s##*) }; set -- $s; echo "${20}"; }
# alive FILE: FILE holds "pid starttime"; true only while that very process lives (a reused pid is not ours)
alive() {
  local p t s; [[ -s $STATE/$1 ]] && read -r p t <"$STATE/$1" || return 1
  [[ -n $p && $(starttime "$p" || true) == "$t" ]] || return 1
  s=$(cat "/proc/$p/stat" 2>/dev/null) || return 1; s=${s##*) }; [[ ${s%% *} != Z ]]
}
init_exe() { readlink "/proc/$(pidof_ init)/exe" 2>/dev/null || true; }
pidof_() { local p t; read -r p t <"$STATE/$1"; echo "$p"; }

enter() { # VIA=exec: in this process's place
  ${VIA:-} nsenter -t "$(pidof_ init)" -m -u -i -n -p -C -- setpriv --bounding-set="$DROPCAPS" \
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/root LANG=C.UTF-8 TERM="${TERM:-dumb}" SYSTEMD_PAGER=cat SYSTEMD_COLORS=0 "$@"
}

# ---- stage 1: PID 1 of the new pid namespace, still seeing the host tree: makes its cgroup, then the cgroup namespace
stage1() {
  local p sub h o u
  read -r p _ </proc/self/stat                          # /proc is still the host's: this is our pid out there
  echo "$p $(starttime "$p")" >"$STATE/init.new"; mv "$STATE/init.new" "$STATE/init"
  mount --make-rprivate /
  mount -t tmpfs -o mode=755,size="${SDSB_SIZE:-2g}" sdsb "$STATE/mnt"
  cd "$STATE/mnt"; mkdir upper work root cg
  mount -t cgroup2 cgroup2 cg
  sub=$(sed -n 's/^0:://p' /proc/self/cgroup); sub=${sub%/}/sdsb-$NAME
  echo "$sub" >"$STATE/cgroup"; mkdir "cg$sub"; echo 0 >"cg$sub/cgroup.procs"; umount cg
  if [[ $CGMODE == v1 ]]; then
    for h in "${V1[@]}"; do
      o=$h; [[ $h != name=* ]] || o=none,$h
      mount -t cgroup -o "$o" cgroup cg
      sub=$(awk -F: -v h="$h" '$2==h{print $3}' /proc/self/cgroup); sub=${sub%/}/sdsb-$NAME
      echo "$o $sub" >>"$STATE/cgroup1"; mkdir "cg$sub"
      if [[ $h == *cpuset* ]]; then for u in cpus mems; do cat "cg${sub%/*}/cpuset.$u" >"cg$sub/cpuset.$u"; done; fi
      echo 0 >"cg$sub/cgroup.procs"; umount cg
    done
  fi
  cd /; exec unshare --cgroup bash "$SELF" __stage2     # no fork: stays PID 1; cgroup root = what was made above
}

bind() { # ro|rw SRC DST(inside)
  local d=$R$3
  if [[ -d $2 ]]; then mkdir -p "$d"; else mkdir -p "$(dirname "$d")"; [[ -e $d ]] || : >"$d"; fi
  mount --bind "$2" "$d"
  [[ $1 == rw ]] || mount -o remount,bind,ro,nosuid "$d"
}

bind_venv() { # SRC DST: same tree, but bin/ and pyvenv.cfg point at the relocated interpreter
  local src=$1 dst=$2 exe base f t c=$W/venv
  exe=$(readlink -f "$src/bin/python"); base=$(dirname "$(dirname "$exe")")
  bind ro "$src" "$dst"
  case $base in /usr|/usr/local) ;; *)
    bind ro "$base" /opt/python-base; base=/opt/python-base
    # A shared libpython is named by its old path; the system's own of another patch level would be taken instead.
    if [[ -e $R$base/lib/libpython3.so ]]; then
      echo "$base/lib" | cat - "$R/etc/ld.so.conf" >"$c.ld"; cp "$c.ld" "$R/etc/ld.so.conf"; /sbin/ldconfig -X -r "$R"
    fi ;;
  esac
  mkdir "$c"; cp -a "$src/bin" "$src/pyvenv.cfg" "$c/"
  sed -i "s|^home *=.*|home = $base/bin|" "$c/pyvenv.cfg"
  for f in "$c"/bin/*; do
    if [[ -L $f ]]; then t=$(readlink "$f"); [[ $t != /* ]] || ln -sfn "$base/bin/${exe##*/}" "$f"
    elif [[ -f $f ]] && head -c2 "$f" | grep -qa '^#!'; then sed -i "1s|$src/|$dst/|" "$f"; fi
  done
  bind ro "$c/bin" "$dst/bin"; bind ro "$c/pyvenv.cfg" "$dst/pyvenv.cfg"
}

# ---- stage 2: builds the root, leaves the host tree, becomes systemd
stage2() {
  local d u h o; W=$STATE/mnt R=$STATE/mnt/root
  mount -t overlay -o "lowerdir=$LOWER,upperdir=$W/upper,workdir=$W/work" overlay "$R"
  mount -t proc -o nosuid,nodev,noexec proc "$R/proc"
  mount --bind "$R/proc/sys" "$R/proc/sys"
  [[ $NET == host ]] || mount --bind "$R/proc/sys/net" "$R/proc/sys/net"
  mount -o remount,bind,ro,nosuid,nodev,noexec "$R/proc/sys"        # else systemd rewrites fs.file-max etc. of the host
  [[ ! -e $R/proc/sysrq-trigger ]] || mount --bind /dev/null "$R/proc/sysrq-trigger"
  mount -t sysfs -o nosuid,nodev,noexec,ro sysfs "$R/sys"
  if [[ $CGMODE == v1 ]]; then
    mount -t tmpfs -o mode=755,nosuid,nodev,noexec tmpfs "$R/sys/fs/cgroup"
    for h in "${V1[@]}"; do
      d=$R/sys/fs/cgroup/${h#name=}; o=$h; [[ $h != name=* ]] || o=none,$h
      mkdir "$d"; mount -t cgroup -o "nosuid,nodev,noexec,$o" cgroup "$d"
    done
    mkdir "$R/sys/fs/cgroup/unified"; mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 "$R/sys/fs/cgroup/unified"
  else
    mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 "$R/sys/fs/cgroup"
  fi
  mount -t tmpfs -o mode=755,nosuid tmpfs "$R/dev"
  for d in "null 1 3" "zero 1 5" "full 1 7" "random 1 8" "urandom 1 9" "tty 5 0"; do
    set -- $d; mknod -m 666 "$R/dev/$1" c "$2" "$3"; done
  mkdir "$R/dev/pts" "$R/dev/shm"
  mount -t devpts -o nosuid,noexec,newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$R/dev/pts"
  ln -s pts/ptmx "$R/dev/ptmx"; ln -s /proc/self/fd "$R/dev/fd"
  for d in 0:stdin 1:stdout 2:stderr; do ln -s "fd/${d%:*}" "$R/dev/${d#*:}"; done
  mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$R/run"
  for d in dev/shm tmp var/tmp; do mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$R/$d"; done
  # a clean /etc/systemd: none of the host's enabled units, sysv scripts, fstab, machine-id
  mkdir -p "$R/etc/systemd/system" "$R/run/systemd/journald.conf.d" "$R/run/systemd/system-generators"
  mount -t tmpfs -o mode=755 tmpfs "$R/etc/systemd/system"
  for u in $MASK; do [[ " ${SDSB_KEEP:-} " == *" $u "* ]] || ln -s /dev/null "$R/etc/systemd/system/$u"; done
  ln -s /dev/null "$R/run/systemd/system-generators/systemd-sysv-generator"
  printf '[Journal]\nStorage=volatile\nRuntimeMaxUse=64M\nAudit=no\nReadKMsg=no\n' >"$R/run/systemd/journald.conf.d/sdsb.conf"
  : >"$R/etc/fstab"; rm -f "$R/etc/machine-id"; tr -d - </proc/sys/kernel/random/uuid >"$R/etc/machine-id"
  hostname sdsb; echo sdsb >"$R/etc/hostname"
  bind ro "$UNITS" /usr/local/lib/systemd/system
  mkdir "$R/etc/systemd/system/multi-user.target.wants"
  for u in "${ENABLE[@]}"; do
    ln -s "/usr/local/lib/systemd/system/$u" "$R/etc/systemd/system/multi-user.target.wants/$u"; done
  for d in "${BINDS[@]}"; do IFS=$'\t' read -r h o u <<<"$d"; bind "$h" "$o" "$u"; done
  [[ -z $VENV ]] || bind_venv "${VENV%%$'\t'*}" "${VENV##*$'\t'}"
  cd "$R"; pivot_root . .; umount -l .; cd /     # the host tree is gone from here on
  mount --make-rshared /    # systemd leaves this to the container manager; LoadCredential= comes out empty without it
  exec setpriv --bounding-set="$DROPCAPS" env -i container=sdsb PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    "$SYSTEMD" --system --unit=multi-user.target --show-status=no
}

# ---- host side
cmd_check() {
  local why= c
  [[ $EUID == 0 ]] || why="not root"
  for c in unshare nsenter setpriv pivot_root flock; do [[ -n $why ]] || command -v $c >/dev/null || why="no $c"; done
  [[ -n $why || -x $SYSTEMD ]] || why="no $SYSTEMD (apt-get install systemd)"
  [[ -n $why ]] || grep -qw overlay /proc/filesystems || why="kernel has no overlayfs"
  [[ -n $why ]] || unshare --fork --pid --mount --uts --ipc --net --cgroup sh -c 'mount -n --make-rprivate / &&
      mount -n -t tmpfs t /mnt && mkdir /mnt/c && mount -n -t cgroup2 c /mnt/c && mkdir /mnt/c/sdsb-chk-'$$' && rmdir /mnt/c/sdsb-chk-'$$ \
      2>/dev/null || why="no right to make namespaces, mounts or cgroups here (unprivileged container?)"
  [[ -z $why ]] || { say "cannot run here: $why"; return 77; }
}

rm_cgroups() { # in a private mount namespace, so that it needs no cgroup mount of the host's
  [[ -s $STATE/cgroup || -s $STATE/cgroup1 ]] || return 0
  unshare --mount bash -c '
    mount -n --make-rprivate /; m=$1/mnt
    { [ ! -s "$1/cgroup" ] || echo "v2 $(cat "$1/cgroup")"; cat "$1/cgroup1" 2>/dev/null; } | while read -r o p; do
      case $p in */sdsb-"$2") ;; *) continue ;; esac
      if [ "$o" = v2 ]; then mount -n -t cgroup2 c "$m"; else mount -n -t cgroup -o "$o" c "$m"; fi || continue
      for i in 1 2 3 4 5 6 7 8 9 10; do
        [ -d "$m$p" ] || break
        find "$m$p" -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.1
      done
      [ ! -d "$m$p" ] || echo "sdsb: cgroup $o:$p still busy" >&2
      umount -n "$m"
    done' _ "$STATE" "$NAME"
}

cmd_down() {
  [[ -e $STATE ]] || return 0
  [[ -d $STATE && -O $STATE && ! -L $STATE ]] || die "$STATE is not mine"
  local end=$(( $(now) + ${SDSB_DOWN_S:-10}*1000000000 ))
  while alive init && (( $(now) < end )) && [[ $(init_exe) == */systemd ]]; do
    kill -s RTMIN+4 "$(pidof_ init)" 2>/dev/null || break               # = poweroff.target; again, should it come too early
    for _ in {1..20}; do alive init || break; sleep 0.05; done
  done
  if alive init; then say "no clean poweroff, killing"; kill -KILL "$(pidof_ init)" 2>/dev/null || true; fi
  for _ in {1..60}; do alive outer || break; sleep 0.05; done
  if alive outer; then kill -KILL "$(pidof_ outer)" 2>/dev/null || true; sleep 0.2; fi   # --kill-child takes init along
  rm_cgroups
  # never rm -rf: should a mount have leaked to here, rmdir fails instead of deleting what is bound below it
  rm -f "$STATE"/{init,init.new,outer,cgroup,cgroup1,console.log,conf}
  if [[ -d $STATE/mnt ]]; then rmdir "$STATE/mnt" || die "$STATE/mnt is not empty"; fi
  rmdir "$STATE" || die "could not remove $STATE"
}

abspath() { [[ -e $1 ]] || die "no such path: $1"; readlink -f "$1"; }
pair() { # SRC[:DST] -> SRC<TAB>DST
  local s=${1%%:*} d; s=$(abspath "$s") || return 1; d=$s; [[ $1 != *:* ]] || d=${1#*:}
  [[ $d == /* && $d != *..* ]] || die "DST not absolute: $d"; printf '%s\t%s' "$s" "$d"; }

cmd_up() {
  local limit=40 t0 end o p outer st=; cmd_check || exit $?
  [[ $# -ge 1 ]] || die "up DIR [options]"
  UNITS=$(abspath "$1") || exit 1; [[ -d $UNITS ]] || die "not a folder: $1"; shift
  BINDS=() ENABLE=() VENV= NET=private LOWER=/ CGMODE=v2 V1=()
  while [[ $# -gt 0 ]]; do [[ $# -ge 2 ]] || die "$1 needs a value"; case $1 in
    --ro|--rw) p=$(pair "$2") || exit 1; BINDS+=("${1#--}"$'\t'"$p")
        if [[ ${p#*$'\t'} =~ ^/(tmp|var/tmp|root|home|run/user)/ ]]; then
          say "note: ${p#*$'\t'} is hidden from units by PrivateTmp=/ProtectHome=/DynamicUser=; give it another DST"; fi;;
    --venv) o=$2; [[ $o == *:* ]] || o=$o:/opt/venv; VENV=$(pair "$o") || exit 1; p=${VENV%%$'\t'*}
        [[ -x $p/bin/python && -f $p/pyvenv.cfg ]] || die "not a venv: $2";;
    --enable) [[ -e $UNITS/$2 ]] || die "no $2 in $UNITS"; ENABLE+=("$2");;
    --net) NET=$2; [[ $NET == private || $NET == host ]] || die "--net private|host";;
    --lower) LOWER=$(abspath "$2") || exit 1; [[ -x $LOWER$SYSTEMD ]] || die "no systemd in $LOWER";;
    --cgroup) CGMODE=$2; [[ $CGMODE == v1 || $CGMODE == v2 ]] || die "--cgroup v1|v2";;
    --timeout) limit=$2; [[ $limit =~ ^[0-9]+$ ]] && (( limit>=1 && limit<=45 )) || die "--timeout 1..45";;
    *) die "unknown option $1";; esac; shift 2; done
  if [[ $CGMODE == v1 ]]; then
    # every one of them: systemd mounts those that it is not given by itself, at the host's root group
    mapfile -t V1 < <(awk -F: '$1>0{print $2}' /proc/self/cgroup)
    [[ " ${V1[*]} " == *" name=systemd "* ]] || die "--cgroup v1: this host has no v1 name=systemd hierarchy"
  fi
  cmd_down
  mkdir -m 700 "$STATE" "$STATE/mnt"
  declare -p UNITS BINDS ENABLE VENV NET LOWER CGMODE V1 | sed 's/^declare /declare -g /' >"$STATE/conf"
  trap 'say interrupted; SDSB_DOWN_S=0 cmd_down; rm -f "$LOCK"; exit 130' INT TERM HUP
  t0=$(now); end=$(( t0 + limit*1000000000 ))
  o="--net"; [[ $NET == private ]] || o=
  SDSB_NAME=$NAME setsid unshare --fork --kill-child --pid --mount --uts --ipc $o bash "$SELF" __stage1 \
    </dev/null >"$STATE/console.log" 2>&1 9>&- &
  outer=$!; echo "$outer $(starttime $outer)" >"$STATE/outer"
  while kill -0 "$outer" 2>/dev/null && [[ ! -s $STATE/init ]] && (( $(now) < end )); do sleep 0.01; done
  while alive init && (( $(now) < end )); do
    if [[ $(init_exe) == */systemd ]]; then
      st=$(enter timeout 5 systemctl is-system-running 2>/dev/null || true)
      case $st in running|degraded) break;; esac
    fi
    sleep 0.05
  done
  case $st in
    running|degraded) say "up in $(( ($(now)-t0)/1000000 )) ms, state=$st, pid=$(pidof_ init)"
      [[ $st == running ]] || enter systemctl --failed --no-legend --plain >&2 ;;
    *) say "boot failed (state=${st:-none}); console, jobs and journal:"; tail -n 30 "$STATE/console.log" >&2
       if alive init; then { enter timeout 5 systemctl list-jobs; enter timeout 5 journalctl -b -n 40; } >&2 || true; fi
       SDSB_DOWN_S=2 cmd_down; rm -f "$LOCK"; exit 1 ;;
  esac
}

lock() { # the holder may remove the file: what was locked must still be what lies at that path
  LOCK=$STATE.lock
  while :; do
    exec 9>"$LOCK"; flock -w 50 9 || die "another up/down is under way"
    [[ ! $LOCK -ef /proc/$$/fd/9 ]] || break
  done
}
case ${1:-} in
  up)     shift; [[ $EUID == 0 ]] || cmd_check || exit $?; lock; cmd_up "$@" ;;
  exec)   shift; [[ $# -gt 0 ]] || die "exec CMD..."; alive init || die "not up"; VIA=exec; enter "$@" ;;
  down)   lock; cmd_down; rm -f "$LOCK" ;;
  pid)    alive init || die "not up"; pidof_ init ;;
  status) alive init || { echo down; exit 1; }; enter systemctl is-system-running ;;
  check)  cmd_check ;;
  __stage1|__stage2) source "$STATE/conf"; "${1#__}" ;;
  *)      sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$SELF"; exit 2 ;;
esac
